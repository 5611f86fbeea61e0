"""Runs an exported file in its runtime and compares its predictions with the model's.

Converters sometimes fail silently: they fix the size of an open dimension, as tf2onnx does in
`TimeDistributed`, drop an activation after a product, or round numbers that should stay exact. So a
file is run on random examples before it gets its final name.
"""

import warnings

import keras
import numpy as np

from keras_learnbits.conversion.input_ranges import first_layers, input_for
from keras_learnbits.layers.traversal import layers_inside

# A batch of 3 reveals outputs that do not depend on the example, and a batch of 1 reveals axes of
# length 1 that were dropped.
BATCH_SIZES = (3, 1)
# Sizes of the other open dimensions. A model refuses sizes that are too small for its windows, or
# that it cannot halve often enough; then the next sizes are tried.
SIZES = (5, 8, 16, 32, 64, 96, 128, 224)
# Two programs for one formula sum in different orders and approximate `exp` and `tanh` differently,
# which changes each result by some units in the last place (2**-24 of it). The effect on the
# outputs depends on the model, so it is measured: inputs and kernels are changed by up to this
# share of themselves, which is more than the rounding of any layer, and the outputs of a file may
# differ by `TIMES_MOVED` times the resulting change. In correct files of 60 small models they
# differed by at most 0.2 times this change. In addition, this share of the largest output is
# tolerated, and an absolute 2**-22, because saturated sigmoids are exact only to a unit in the last
# place of 1 (onnxruntime returns 0 for all values below 2e-8).
FLOAT_ARITHMETIC = 2.0**-16
# Integer arithmetic rounds the inputs of a layer to 8 bits of their range, by up to 2**-9 of the
# largest one. This is a larger share of most inputs, which are several times smaller, so inputs and
# kernels are changed by up to 2**-6 of themselves.
INT8_ARITHMETIC = 2.0**-6
TIMES_MOVED = 4.0
ABSOLUTE_TOLERANCE = 2.0**-22
# A correct file may fail on single examples: a quantized activation may round a value to the next
# level, which changes an output by more than such a change of the inputs, and runtimes fail where
# TensorFlow does not on sizes at which a window is empty. A wrong file fails on all examples. So a
# file is refused only if it fails in this many draws, of different values and of larger sizes.
DRAWS = 3


def check_file(path, function, load, arithmetic=FLOAT_ARITHMETIC):
    """Raises a ValueError if the predictions of a file differ from its model's.

    The file runs on two batch sizes, and on two sizes of the open dimensions, if there are any. If
    the model accepts none of the inputs that are drawn, there is a warning and no check.

    Args:
        path: Path of the file.
        function: `ModelFunction`.
        load: Function of the path to a function of a list of arrays, the inputs, to a list of
            arrays, the outputs.
        arithmetic: Share by which the file's arithmetic may change inputs and kernels.
    """
    for seed in range(DRAWS):
        tried = examples(function.model, function.specs, function.predictions, seed)
        if not tried:
            warnings.warn(
                f"The exported file of model {function.model.name!r} was not compared with it: the "
                "model accepts none of the random inputs that were tried, of "
                f"{[(str(spec.shape), spec.dtype.name) for spec in function.specs]}. Give sizes of "
                "open dimensions in `input_signature`, or check the file yourself.",
                stacklevel=2,
            )
            return
        fault = _fault(path, function, load, tried, arithmetic)
        if fault is None:
            return
    is_open = any(None in spec.shape.as_list()[1:] for spec in function.specs)
    advice = "Give the open dimensions sizes in `input_signature`; " if is_open else ""
    raise ValueError(
        "A file must predict what its model predicts, or it is not written. "
        f"{advice}`check=False` writes the file without this check. "
        f"Received: model={function.model.name!r}, {fault}"
    )


def _fault(path, function, load, tried, arithmetic):
    """A description of how the predictions of a file are wrong; None if they are right."""
    shapes = [[each.shape for each in inputs] for inputs, _ in tried]
    try:
        run = load(path)
        found = [run(inputs) for inputs, _ in tried]
    except ImportError:
        raise
    except Exception as error:  # runtimes raise custom exceptions
        said = str(error).strip().partition("\n")[0][:300]
        return f"whose file fails on inputs of shapes {shapes}: {said}"
    moved = [_moved(function, inputs, arithmetic) for inputs, _ in tried]
    for index, name in enumerate(function.outputs):
        expected = [outputs[index] for _, outputs in tried]
        tolerance = ABSOLUTE_TOLERANCE + arithmetic * max(map(largest, expected))
        tolerance += TIMES_MOVED * max(largest(each[index]) for each in moved)
        for shape, wanted, outputs in zip(shapes, expected, found, strict=True):
            fault = difference(outputs[index], wanted, tolerance)
            if fault:
                return f"whose file has an output {name!r} {fault}, for inputs of shapes {shape}"
    return None


def examples(model, specs, predict, seed=0):
    """Random inputs that a model accepts, and its predictions for them.

    Args:
        model: A Keras model; its embeddings determine which indices are valid, and its first layers
            the range of other inputs.
        specs: List of `tf.TensorSpec` of its inputs.
        predict: Function of a list of arrays to a list of arrays, the predictions.
        seed: Integer below `DRAWS`, which determines the values and the sizes.

    Returns:
        List of at most two pairs of inputs and predictions; fewer if no dimension is open, or if
        the model accepts no more.
    """
    if any(spec.shape.rank is None for spec in specs):
        return []
    tables = [layer.input_dim for layer in layers_inside(model)
              if isinstance(layer, keras.layers.Embedding)]  # fmt: skip
    valid = min(tables, default=2)
    # If no input has an integer type, floats may be the indices. Indices may also be those of
    # layers other than embeddings.
    floats_are_indices = bool(tables) and not any(spec.dtype.is_integer for spec in specs)
    kinds = [(floats_are_indices, valid), (not floats_are_indices, valid), (True, 2), (True, 1)]
    layers = first_layers(model, [spec.dtype.name for spec in specs])
    accepted = (_accepted(specs, layers, predict, seed, *kind) for kind in kinds)
    return next(filter(None, accepted), [])


def _accepted(specs, layers, predict, seed, integers, below):
    """The examples of one kind that the model accepts, as `examples` returns them."""
    found, wanted = [], 1 + any(None in spec.shape.as_list() for spec in specs)
    for size in SIZES[2 * seed :] + SIZES[: 2 * seed]:
        rng, batch_size = np.random.default_rng([seed, len(found)]), BATCH_SIZES[len(found)]
        try:
            inputs = [
                _drawn(rng, spec, first, batch_size, size, integers, below)
                for spec, first in zip(specs, layers, strict=True)
            ]
            outputs = predict(inputs)
        except Exception:  # a model of a user may raise anything
            continue
        if all(each.size for each in outputs):
            found.append((inputs, outputs))
        if len(found) == wanted:
            break
    return found


def _drawn(rng, spec, layers, batch_size, size, integers, below):
    """A random array of a spec.

    Args:
        rng: `np.random.Generator`.
        spec: `tf.TensorSpec`.
        layers: List of the layers that set the range of the input; then `below` has no effect.
        batch_size: Length of the first axis if it is open.
        size: Length of the other axes that are open.
        integers: Whether floats also have integer values.
        below: Exclusive bound of the integers.

    Raises:
        TypeError: Values of this type, such as strings, cannot be drawn.
    """
    shape = [
        length or (size if axis else batch_size) for axis, length in enumerate(spec.shape.as_list())
    ]
    dtype = spec.dtype.as_numpy_dtype
    if (spec.dtype.is_floating and not integers) or (spec.dtype.is_integer and layers):
        return input_for(rng.normal(size=shape), layers, dtype)
    if spec.dtype.is_floating or spec.dtype.is_integer or spec.dtype.is_bool:
        return rng.integers(0, 2 if spec.dtype.is_bool else below, shape).astype(dtype)
    raise TypeError(f"Inputs must be numbers to be drawn. Received: {spec.dtype}")


def _moved(function, inputs, share):
    """The change of each output after a small change of inputs and kernels, a list of arrays."""
    rng = np.random.default_rng(0)

    def changed(array):
        if array.dtype.kind != "f":
            return array
        change = rng.uniform(-share, share, array.shape)
        return (array * (1 + change)).astype(array.dtype)

    kernels = [kernel.levels for kernel in function.kernels.values()]
    exact = function.predictions_at(inputs, kernels)
    near = function.predictions_at(list(map(changed, inputs)), list(map(changed, kernels)))
    return [_apart(each, other) for each, other in zip(exact, near, strict=True)]


def difference(found, expected, tolerance):
    """A description of how an array differs from the expected one; None if it does not.

    Args:
        found: Array.
        expected: Array of the expected shape and values.
        tolerance: Number, the largest difference of an element that is tolerated.

    Examples:
        >>> difference(np.ones(3), np.ones((3, 1)), 0.1)
        'of shape (3,), not (3, 1)'
        >>> difference(np.zeros(3), np.array([0, 0, 0.5]), 0.1)
        'off by up to 0.5, where 0.1 is tolerated'
    """
    found = np.asarray(found)
    if found.shape != expected.shape:
        return f"of shape {found.shape}, not {expected.shape}"
    off = largest(_apart(found, expected), default=np.inf)
    if off > tolerance:
        return f"off by up to {off:.2g}, where {tolerance:.2g} is tolerated"
    return None


def _apart(array, other):
    """Absolute differences, float64; 0 where both are the same infinity, or NaN."""
    array, other = (np.asarray(each, "float64") for each in (array, other))
    with np.errstate(invalid="ignore"):
        same = (array == other) | (np.isnan(array) & np.isnan(other))
        return np.where(same, 0.0, np.abs(array - other))


def largest(array, default=0.0):
    """The largest magnitude of an array; `default` replaces NaN and infinities."""
    magnitudes = np.abs(np.asarray(array, "float64"))
    return float(np.where(np.isfinite(magnitudes), magnitudes, default).max())
