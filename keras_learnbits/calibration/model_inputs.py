"""Arrays in the structure, the shapes and the types that a model takes."""

import math

import keras
import numpy as np
import tensorflow as tf

from keras_learnbits._keras import symbolic_inputs
from keras_learnbits.calibration.inference import as_tensors, outputs_of, rows
from keras_learnbits.calibration.lazy_rows import LazyRows


def is_arrays(data):
    """Whether data are arrays, or a structure of them."""
    leaves = keras.tree.flatten(data)
    return bool(leaves) and all(
        hasattr(each, "shape") and hasattr(each, "dtype") and not isinstance(each, tf.TypeSpec)
        for each in leaves
    )


def as_numbers(array, argument):
    """An array as a NumPy array; `LazyRows` and files that are mapped into memory are not read.

    Args:
        array: Array, tensor or `LazyRows` of numbers.
        argument: Name of the argument that it belongs to, for the error.

    Raises:
        ValueError: They are not numbers, or there is no axis of examples.
    """
    if isinstance(array, LazyRows) and array.dtype.kind in "biuf":
        return array
    found = np.asarray(array)  # an object without axes if it is ragged or sparse
    if found.dtype.name == "bfloat16":
        found = found.astype("float32")
    if found.ndim == 0 or found.dtype.kind not in "biuf":
        dtype, shape = (getattr(array, k, getattr(found, k)) for k in ("dtype", "shape"))
        raise ValueError(
            f"`{argument}` must be arrays of numbers with an axis of examples; batch a dataset of "
            f"single examples, and pad ragged data to one length. Received: "
            f"{type(array).__name__} of type {dtype} and shape {shape}"
        )
    return found


def as_inputs(arrays, model, argument):
    """Arrays in the structure and in the types of the inputs of a model.

    Floats become float32, and all other numbers what the input takes. A model with a custom `call`
    does not say what it takes: integers remain integers.

    Args:
        arrays: Structure of NumPy arrays of numbers, with an axis of examples.
        model: The Keras model.
        argument: Name of the argument, for errors.

    Raises:
        ValueError: The model has other inputs, numbers are not finite, or an input of integers
            cannot hold the numbers.
    """
    wanted = symbolic_inputs(model)
    if wanted is None:
        return keras.tree.map_structure(lambda each: _as_floats(each, argument), arrays)
    found, specs = _in_order(arrays, wanted), keras.tree.flatten(wanted)
    shapes = [tuple(each.shape) for each in specs]
    given = [each.shape for each in found]
    if len(shapes) != len(given) or not all(map(_fits, given, shapes)):
        raise ValueError(
            f"`{argument}` must be inputs of the model, in batches; as in `fit`, a tuple is inputs "
            "and labels, a list or dictionary several inputs. "
            f"Received: {described(arrays)} for inputs of shape {shapes}"
        )
    converted = [_as_dtype(*pair, argument) for pair in zip(found, specs, strict=True)]
    return keras.tree.pack_sequence_as(wanted, converted)


def check_call(inputs, model, argument):
    """Calls a model with one example; a ValueError that names the argument if that fails."""
    try:
        outputs_of(model, as_tensors(rows(inputs, slice(1))))
    except (ValueError, TypeError, tf.errors.InvalidArgumentError) as error:
        raise ValueError(
            f"`{argument}` must be inputs of the model. Received: {described(inputs)}, with which "
            f"model {model.name!r} fails: {error}"
        ) from error


def described(arrays):
    """Types and shapes of a structure of arrays, for errors."""
    shapes = keras.tree.map_structure(lambda each: f"{each.dtype}{list(each.shape)}", arrays)
    return str(shapes).replace("'", "")


def numbers_per_example(arrays):
    """How many numbers one example of a structure of arrays has."""
    return sum(math.prod(each.shape[1:]) for each in keras.tree.flatten(arrays))


def _in_order(inputs, wanted):
    """The arrays in the order of the model's inputs: by name, if they have names."""
    specs = keras.tree.flatten(wanted)
    names = {spec.name for spec in specs}
    if isinstance(inputs, dict) and not isinstance(wanted, dict) and inputs.keys() == names:
        return [inputs[spec.name] for spec in specs]
    return keras.tree.flatten(inputs)


def _fits(given, wanted):
    return len(given) == len(wanted) and all(
        b is None or a == b for a, b in zip(given[1:], wanted[1:], strict=True)
    )


def _as_dtype(array, spec, argument):
    dtype = keras.backend.standardize_dtype(spec.dtype)
    if "float" in dtype:
        return _as_floats(array.astype("float32", copy=False), argument)
    _as_floats(array, argument)
    with np.errstate(invalid="ignore"):  # what is out of range is found below
        converted = array.astype(dtype, copy=False)
    if not np.array_equal(converted, array):
        raise ValueError(
            f"`{argument}` must be values that an input of type {dtype} holds; give those that the "
            "model was trained on, e.g. images of values 0..255 without dividing them. "
            f"Received: {array.dtype} from {array.min():g} to {array.max():g}"
        )
    return converted


def _as_floats(array, argument):
    """The array; float32 if it has floats."""
    if array.dtype.kind != "f":
        return array
    with np.errstate(over="ignore"):
        array = array.astype("float32", copy=False)
    if not np.all(np.isfinite(array)):
        raise ValueError(
            f"`{argument}` must be finite numbers. Received: NaN or infinity in an input of shape "
            f"{array.shape}"
        )
    return array
