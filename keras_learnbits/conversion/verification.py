"""Compares the predictions of a converted model with those of the original."""

import keras
import numpy as np

from keras_learnbits._keras import inputs_built_for, symbolic_inputs
from keras_learnbits.conversion.input_ranges import first_layers, input_for
from keras_learnbits.layers.compute_scope import computing_with_float_kernels
from keras_learnbits.layers.traversal import layers_inside

# Largest relative difference of the predictions that may result from summing in another order.
TOLERANCE = {"float16": 2e-2, "bfloat16": 1e-1}
# Batch size, and the sizes that are tried one after another for other open dimensions.
BATCH, SIZES = 2, (8, 32, 64)


def check_conversion(model, converted, x=None):
    """Compares a model with its conversion, with the float kernels of both.

    Args:
        model: The original model.
        converted: The converted model.
        x: Input of both models; by default random inputs of the model's shapes.

    Returns:
        None, or a string with the reason why they could not be compared.

    Raises:
        ValueError: The predictions differ; or the original cannot be called with `x`.
    """
    examples = list(_random_examples(model)) if x is None else [x]
    example, run = _first_that_runs(model, examples, given=x is not None)
    if run is None:
        return "not compared with the original, which took no random input: give `x`"
    outputs, integers = run
    # Random numbers of `keras.random` depend on integers in variables, which each run changes. A
    # second run that begins with those that the first one leaves differs if the model samples.
    if _difference(outputs, _float_run(model, example, integers)[0]) > 0:
        return "not compared with the original, whose predictions are random"
    difference = _difference(outputs, _float_run(converted, example)[0])
    dtypes = {layer.compute_dtype for layer in layers_inside(model)}
    tolerance = max([1e-3, *(TOLERANCE.get(dtype, 0) for dtype in dtypes)])
    if difference > tolerance:
        raise ValueError(
            "The copy must make the predictions of the model. If a layer keeps state in a "
            "`tf.Variable` or an array, which Keras does not copy, create it with `add_weight`. If "
            "a `get_config` does not return all arguments of `__init__`, add them. Or use "
            "`copy=False`, which does not copy layers. "
            f"Received: model={model.name!r}, with outputs that differ by {difference:.2g} times "
            "the largest"
        )
    return None


def _first_that_runs(model, examples, given):
    """The first example that a model accepts, and its `_float_run`; None and None without one."""
    for example in examples:
        try:
            return example, _float_run(model, example)
        except Exception as error:  # custom layers may raise anything
            if given:
                raise ValueError(
                    f"`x` must be an input that the model accepts. Received: {error}"
                ) from error
    return None, None


def _random_examples(model):
    """Yields structures of random inputs: normal numbers, then zeros and ones, of each size.

    Normal numbers have the range for which the first layers are made. Zeros and ones are valid
    where inputs are indices, e.g. of an embedding.
    """
    specs = symbolic_inputs(model)
    if specs is None:
        specs = inputs_built_for(model)
    flat = keras.tree.flatten(specs)
    if specs is None or any(each.dtype == "string" or each.sparse for each in flat):
        return
    layers = first_layers(model, [each.dtype for each in flat])
    rng = np.random.default_rng(0)
    for size in SIZES:
        for normal in (True, False):
            pairs = zip(flat, layers, strict=True)
            drawn = [_drawn(rng, spec, first, size, normal) for spec, first in pairs]
            yield keras.tree.pack_sequence_as(specs, drawn)


def _drawn(rng, spec, layers, size, normal):
    """A random array; with `normal`, of normal numbers if its range is known or it has floats."""
    shape = [BATCH, *(number or size for number in spec.shape[1:])]
    shape[:1] = [number or BATCH for number in spec.shape[:1]]
    dtype = "float32" if "float" in spec.dtype else spec.dtype
    if normal and (dtype == "float32" or layers):
        return input_for(rng.normal(size=shape), layers, dtype)
    return rng.integers(0, 2, shape).astype(dtype)


def _float_run(model, example, values=()):
    """Runs a model with float kernels in inference. The model does not change.

    Args:
        model: A Keras model.
        example: Its input.
        values: List of pairs of a variable and the value that it has in this run.

    Returns:
        The outputs, a list of arrays; and the integers that the run would have changed, in the form
        of `values`.
    """
    # The stateless scope receives the updates of seeds and statistics.
    scope = keras.StatelessScope(list(values), initialize_variables=False)
    with computing_with_float_kernels(), scope:
        outputs = model(example, training=False)
    integers = [each for each in model.variables if "int" in each.dtype]
    changed = [(each, scope.get_current_value(each)) for each in integers]
    arrays = [keras.ops.convert_to_numpy(each) for each in keras.tree.flatten(outputs)]
    return arrays, [(each, value) for each, value in changed if value is not None]


def _difference(ones, others):
    """Largest difference between two lists of arrays, relative to the largest number."""
    if [one.shape for one in ones] != [other.shape for other in others]:
        return np.inf
    largest = 0.0
    for one, other in zip(ones, others, strict=True):
        if not np.issubdtype(one.dtype, np.number) and one.dtype != bool:
            differs = float(np.any(one != other))
        else:
            one, other = np.asarray(one, "float64"), np.asarray(other, "float64")
            usable = np.isfinite(one) & np.isfinite(other)
            scale = np.abs(one[usable]).max(initial=0.0) or 1.0
            differs = np.abs(one - other)[usable].max(initial=0.0) / scale
            differs = differs if np.array_equal(np.isfinite(one), np.isfinite(other)) else np.inf
        largest = max(largest, differs)
    return largest
