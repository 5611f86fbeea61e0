"""Example inputs from arrays, datasets and generators, checked before work starts."""

import itertools

import keras
import numpy as np
import tensorflow as tf

from keras_learnbits._keras import symbolic_inputs
from keras_learnbits.calibration.inference import as_tensors, in_inference, rows, size_of

FEWEST = 8
# Numbers in all example inputs: 1 GB of float32.
MOST_NUMBERS = 2**28


def read_examples(data, model, most, seed):
    """Example inputs of a model, as arrays in memory, in random order.

    As in `keras.Model.fit`, a tuple is inputs and labels, and the labels are ignored.

    Args:
        data: Array, structure of arrays, `tf.data.Dataset` of batches, `keras.utils.PyDataset`,
            generator or other iterable of batches.
        model: The Keras model.
        most: Largest number of examples to keep; fewer are kept if they have more than
            `MOST_NUMBERS` numbers. Arrays are sampled at random; of other data the first examples
            are taken.
        seed: Integer, the seed of the random sample and order.

    Returns:
        Structure of NumPy arrays in the model's structure of inputs, all of one length, of the
        types that the model takes.

    Raises:
        ValueError: There are fewer than eight examples, or some are not numbers; or the model does
            not take them.
    """
    inputs = _without_labels(data)
    inputs = _from_arrays(inputs) if _is_arrays(inputs) else _from_batches(data, most)
    lengths = {len(each) for each in keras.tree.flatten(inputs)}
    if len(lengths) != 1 or min(lengths) < FEWEST:
        raise ValueError(
            f"`data` must have at least {FEWEST} examples, the same number for each input. "
            f"Received: {_shapes(inputs)}"
        )
    # Data may be sorted, and the first examples are used to represent all of them.
    order = np.random.default_rng(seed).permutation(size_of(inputs))
    numbers = sum(each[0].size for each in keras.tree.flatten(inputs))
    inputs = rows(inputs, order[: max(min(most, MOST_NUMBERS // numbers), FEWEST)])
    for each in keras.tree.flatten(inputs):
        if each.dtype.kind == "f" and not np.all(np.isfinite(each)):
            raise ValueError(
                "`data` must be finite numbers. Received: NaN or infinity in an input of shape "
                f"{each.shape}"
            )
    return _as_inputs(inputs, model)


def _without_labels(data):
    return data[0] if isinstance(data, tuple) and data else data


def _is_arrays(data):
    """Whether data are arrays, or a structure of them."""
    leaves = keras.tree.flatten(data)
    return bool(leaves) and all(
        hasattr(each, "shape") and hasattr(each, "dtype") and not isinstance(each, tf.TypeSpec)
        for each in leaves
    )


def _from_arrays(data):
    return keras.tree.map_structure(_as_numbers, data)


def _from_batches(data, most):
    kept, count = [], 0
    for batch in _batches(data):
        inputs = keras.tree.map_structure(_as_numbers, _without_labels(batch))
        kept.append(inputs)
        count += size_of(inputs)
        if count >= most:  # an endless generator ends here
            break
    if not kept:
        raise ValueError("`data` must have examples. Received: a dataset or generator without any")
    try:
        joined = keras.tree.map_structure(lambda *parts: np.concatenate(parts), *kept)
    except ValueError as error:
        raise ValueError(
            "`data` must be batches of one shape, apart from the number of examples; pad "
            f"sequences to one length. Received: {error}"
        ) from error
    return rows(joined, slice(most))


def _batches(data):
    if isinstance(data, keras.utils.PyDataset):
        number = data.num_batches
        return (data[index] for index in (itertools.count() if number is None else range(number)))
    try:
        return iter(data)
    except TypeError:
        raise ValueError(
            "`data` must be an array, a structure of arrays, or a dataset or generator of "
            f"batches. Received: an object of type {type(data).__name__}"
        ) from None


def _as_numbers(array):
    array = np.asarray(array)
    if array.dtype.name == "bfloat16":
        array = array.astype("float32")
    if array.ndim == 0 or array.dtype.kind not in "biuf":
        raise ValueError(
            "`data` must be arrays of numbers with an axis of examples. "
            f"Received: {array.dtype} of shape {array.shape}"
        )
    return array.astype("float32") if array.dtype.kind == "f" else array


def _as_inputs(inputs, model):
    """The inputs in the model's structure and types; a ValueError if it does not take them."""
    received, wanted = _shapes(inputs), symbolic_inputs(model)
    if wanted is not None:
        arrays, specs = _in_order(inputs, wanted), keras.tree.flatten(wanted)
        shapes = [tuple(each.shape) for each in specs]
        given = [each.shape for each in arrays]
        if len(shapes) != len(given) or not all(map(_fits, given, shapes)):
            raise ValueError(
                "`data` must be inputs of the model, in batches; as in `fit`, a tuple is inputs "
                "and labels, a list or dictionary several inputs. "
                f"Received: {received} for inputs of shape {shapes}"
            )
        arrays = map(_as_dtype, arrays, specs)
        inputs = keras.tree.pack_sequence_as(wanted, list(arrays))
    try:
        in_inference(model, as_tensors(rows(inputs, slice(1))))
    except (ValueError, TypeError, tf.errors.InvalidArgumentError) as error:
        raise ValueError(
            f"`data` must be inputs of the model. Received: {received}, with which "
            f"model {model.name!r} fails: {error}"
        ) from error
    return inputs


def _in_order(inputs, wanted):
    """The arrays in the order of the model's inputs: by name, if they have names."""
    specs = keras.tree.flatten(wanted)
    names = {spec.name for spec in specs}
    if isinstance(inputs, dict) and not isinstance(wanted, dict) and inputs.keys() == names:
        return [inputs[spec.name] for spec in specs]
    return keras.tree.flatten(inputs)


def _as_dtype(array, spec):
    """Floats as float32, integers as integers, whatever the type of the array."""
    dtype = keras.backend.standardize_dtype(spec.dtype)
    return array.astype("float32" if "float" in dtype else dtype)


def _fits(given, wanted):
    return len(given) == len(wanted) and all(
        b is None or a == b for a, b in zip(given[1:], wanted[1:], strict=True)
    )


def _shapes(inputs):
    shapes = keras.tree.map_structure(lambda each: f"{each.dtype}{list(each.shape)}", inputs)
    return str(shapes).replace("'", "")
