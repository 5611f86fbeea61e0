"""Runs an exported file in its runtime and compares its predictions with the model's.

Converters fail silently now and then: they fix the size of a dimension that is open, as tf2onnx
does in `TimeDistributed`, drop an activation behind a product, or round what they should not. So
a file is tried on random examples before it takes its name.
"""

import warnings

import keras
import numpy as np

from keras_learnbits.layers.traversal import layers_inside

# A batch of one hides what does not depend on the example, and shows what drops axes of length 1.
BATCH_SIZES = (3, 1)
# For the other dimensions that are open. Models refuse sizes that are too small for their windows,
# or that they cannot halve often enough; then the next ones are tried.
SIZES = (5, 8, 16, 32, 64, 96, 128, 224)
# Two programs for one formula sum in different orders and approximate `exp` and `tanh` in their own
# ways, which changes each result by some units in the last place, 2**-24 of it. What that does to
# the outputs depends on the model, so it is measured: inputs and kernels are changed by up to a
# share of themselves, which is more than the rounding of any layer, and a file may be off by
# `TIMES_MOVED` times what this moves the outputs. Right files of 60 small models were off by 0.2
# times at most. The same share of the largest output is permitted in any case, and an absolute
# 2**-22: sigmoids that saturate are exact to a unit in the last place of 1 only (onnxruntime gives
# 0 for all below 2e-8).
FLOAT_ARITHMETIC = 2.0**-16
# Integer arithmetic rounds the inputs of a layer to 8 bits of their range, by up to 2**-9 of the
# largest. Most inputs are several times smaller than that, and inputs and kernels enter a product
# alike, so kernels are changed by up to 2**-6 of themselves.
INT8_ARITHMETIC = 2.0**-6
TIMES_MOVED = 4.0
ABSOLUTE_TOLERANCE = 2.0**-22
# Quantized activations round some value in thousands to the next level after such a change, which
# moves an output by more; and on sizes that leave a window nothing, runtimes fail where TensorFlow
# does not. A file that is wrong is so on all examples: it is refused after so many draws, of other
# values and larger sizes, of which none agrees.
DRAWS = 3


def check_file(path, function, load, arithmetic=FLOAT_ARITHMETIC):
    """Raises a ValueError if a file does not predict what its model does.

    It runs on two batch sizes, and on two sizes of the dimensions that are open, if there are any.
    Where no inputs can be drawn that the model accepts, there is a warning and no check.

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
    raise ValueError(
        "A file must predict what its model predicts, or it is not written. "
        f"Received: model={function.model.name!r}, {fault}. If a dimension of the inputs is open, "
        "give its size in `input_signature`; `check=False` writes the file without this check."
    )


def _fault(path, function, load, tried, arithmetic):
    """What a file does wrong with examples, in words; None if nothing."""
    shapes = [[each.shape for each in inputs] for inputs, _ in tried]
    try:
        run = load(path)
        found = [run(inputs) for inputs, _ in tried]
    except ImportError:
        raise
    except Exception as error:  # runtimes have exceptions of their own
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
    """Random inputs that a model accepts, and what it predicts for them.

    Args:
        model: The model, whose embeddings say which indices are valid.
        specs: List of `tf.TensorSpec` of its inputs.
        predict: Function of a list of arrays to a list of arrays, the predictions.
        seed: Integer below `DRAWS`; other examples for another one, of other sizes.

    Returns:
        List of at most two pairs of inputs and predictions; fewer if no dimension is open, or if
        the model accepts no more.
    """
    if any(spec.shape.rank is None for spec in specs):
        return []
    tables = [layer.input_dim for layer in layers_inside(model)
              if isinstance(layer, keras.layers.Embedding)]  # fmt: skip
    valid = min(tables, default=2)
    # Where no input is of integers, floats may be the indices; and indices may be of something else
    # than embeddings.
    floats_are_indices = bool(tables) and not any(spec.dtype.is_integer for spec in specs)
    kinds = [(floats_are_indices, valid), (not floats_are_indices, valid), (True, 2), (True, 1)]
    return next(filter(None, (_accepted(specs, predict, seed, *kind) for kind in kinds)), [])


def _accepted(specs, predict, seed, integers, below):
    """The examples of one kind that the model accepts, as `examples` returns them."""
    found, wanted = [], 1 + any(None in spec.shape.as_list() for spec in specs)
    for size in SIZES[2 * seed :] + SIZES[: 2 * seed]:
        rng, batch_size = np.random.default_rng([seed, len(found)]), BATCH_SIZES[len(found)]
        try:
            inputs = [_drawn(rng, spec, batch_size, size, integers, below) for spec in specs]
            outputs = predict(inputs)
        except Exception:  # a model of a user may raise anything
            continue
        if all(each.size for each in outputs):
            found.append((inputs, outputs))
        if len(found) == wanted:
            break
    return found


def _drawn(rng, spec, batch_size, size, integers, below):
    """A random array of a spec.

    Args:
        rng: `np.random.Generator`.
        spec: `tf.TensorSpec`.
        batch_size: Length of the first axis if it is open.
        size: Length of the other axes that are open.
        integers: Whether floats are to be integers, too.
        below: Exclusive bound of the integers.

    Raises:
        TypeError: There is nothing to draw of this type, as strings.
    """
    shape = [
        length or (size if axis else batch_size) for axis, length in enumerate(spec.shape.as_list())
    ]
    if spec.dtype.is_floating and not integers:
        return rng.normal(size=shape).astype(spec.dtype.as_numpy_dtype)
    if spec.dtype.is_floating or spec.dtype.is_integer or spec.dtype.is_bool:
        high = 2 if spec.dtype.is_bool else below
        return rng.integers(0, high, shape).astype(spec.dtype.as_numpy_dtype)
    raise TypeError(f"Inputs must be numbers to be drawn. Received: {spec.dtype}")


def _moved(function, inputs, share):
    """How far a small change of inputs and kernels moves each output, a list of arrays."""
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
    """What is wrong with an array, in words; None if nothing is.

    Args:
        found: Array.
        expected: The array that it must be.
        tolerance: Largest difference that is permitted of an element.

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
    """The largest magnitude of an array; `default` in the place of NaN and infinities."""
    magnitudes = np.abs(np.asarray(array, "float64"))
    return float(np.where(np.isfinite(magnitudes), magnitudes, default).max())
