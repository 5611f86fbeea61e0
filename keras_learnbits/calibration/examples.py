"""Example inputs from arrays, datasets and generators, checked before work starts."""

import keras
import numpy as np
import tensorflow as tf

from keras_learnbits._keras import symbolic_inputs
from keras_learnbits.calibration.inference import as_tensors, in_inference, rows, size_of

FEWEST = 8


def read_examples(data, model, most, seed):
    """Example inputs of a model, as arrays in memory.

    As in `keras.Model.fit`, a tuple is inputs and labels, and the labels are ignored.

    Args:
        data: Array, structure of arrays, `tf.data.Dataset` of batches, `keras.utils.PyDataset`,
            generator or other iterable of batches.
        model: The Keras model.
        most: Number of examples to keep: drawn at random from arrays, the first ones of the rest.
        seed: Integer, of the draw.

    Returns:
        Structure of NumPy arrays with the model's structure of inputs, all of one length. Floats
        are float32.

    Raises:
        ValueError: There are less than eight examples, or some are not numbers; or the model does
            not take them.
    """
    inputs = _from_arrays(data, most, seed) if _is_arrays(data) else _from_batches(data, most)
    arrays = keras.tree.flatten(inputs)
    lengths = {len(each) for each in arrays}
    if len(lengths) != 1 or min(lengths) < FEWEST:
        raise ValueError(
            f"`data` must have at least {FEWEST} examples, as many of each input. "
            f"Received: {_shapes(inputs)}"
        )
    for each in arrays:
        if np.issubdtype(each.dtype, np.floating) and not np.all(np.isfinite(each)):
            raise ValueError(
                "`data` must be finite numbers. Received: NaN or infinity in an input of shape "
                f"{each.shape}"
            )
    _check_inputs(inputs, model)
    return _as_floats(inputs, symbolic_inputs(model))


def _is_arrays(data):
    """Whether data are arrays, or a structure of them."""
    leaves = keras.tree.flatten(data)
    return bool(leaves) and all(
        isinstance(each, np.ndarray | np.generic | tf.Tensor | tf.Variable | keras.Variable)
        or (hasattr(each, "__array__") and hasattr(each, "shape"))
        for each in leaves
    )


def _from_arrays(data, most, seed):
    inputs = _without_labels(data)
    size = min(len(each) for each in keras.tree.flatten(inputs))
    rows = np.arange(size)
    if size > most:
        rows = np.sort(np.random.default_rng(seed).choice(size, most, replace=False))
    # Of unequal lengths, which are refused later, none is cut.
    return keras.tree.map_structure(
        lambda each: _as_numbers(each if len(each) <= most else np.asarray(each)[rows]), inputs
    )


def _from_batches(data, most):
    if isinstance(data, keras.utils.PyDataset):
        batches = (data[index] for index in range(data.num_batches or len(data)))
    else:
        try:
            batches = iter(data)
        except TypeError:
            raise ValueError(
                "`data` must be an array, a structure of arrays, or a dataset or generator of "
                f"batches. Received: an object of type {type(data).__name__}"
            ) from None
    kept, count = [], 0
    for batch in batches:
        inputs = keras.tree.map_structure(_as_numbers, _without_labels(batch))
        kept.append(inputs)
        count += size_of(inputs)
        if count >= most:  # an endless generator ends here
            break
    if not kept:
        raise ValueError("`data` must have examples. Received: a dataset or generator without any")
    return keras.tree.map_structure(lambda *parts: np.concatenate(parts)[:most], *kept)


def _without_labels(data):
    return data[0] if isinstance(data, tuple) and data else data


def _as_numbers(array):
    array = np.asarray(array)
    if array.ndim == 0 or array.dtype.kind not in "biuf":
        raise ValueError(
            "`data` must be arrays of numbers with an axis of examples. "
            f"Received: {array.dtype} of shape {array.shape}"
        )
    return array.astype("float32") if array.dtype.kind == "f" else array


def _check_inputs(inputs, model):
    """Raises a ValueError unless the model takes such inputs."""
    wanted = symbolic_inputs(model)
    if wanted is not None:
        shapes = [tuple(each.shape) for each in keras.tree.flatten(wanted)]
        given = [each.shape for each in keras.tree.flatten(inputs)]
        if len(shapes) != len(given) or not all(map(_fits, given, shapes)):
            raise ValueError(
                "`data` must be inputs of the model, in batches; as in `fit`, a tuple is inputs "
                "and labels, a list or dictionary several inputs. "
                f"Received: {_shapes(inputs)} for inputs of shape {shapes}"
            )
    try:
        in_inference(model, as_tensors(rows(inputs, slice(1))))
    except (ValueError, TypeError, tf.errors.InvalidArgumentError) as error:
        raise ValueError(
            f"`data` must be inputs of the model. Received: {_shapes(inputs)}, with which "
            f"model {model.name!r} fails: {error}"
        ) from error


def _as_floats(inputs, wanted):
    """Integers, such as images of 256 levels, in float32 where the model takes floats."""
    if wanted is None:
        return inputs
    specs = keras.tree.flatten(wanted)
    arrays = [
        each.astype("float32") if "float" in keras.backend.standardize_dtype(spec.dtype) else each
        for each, spec in zip(keras.tree.flatten(inputs), specs, strict=True)
    ]
    return keras.tree.pack_sequence_as(inputs, arrays)


def _fits(given, wanted):
    return len(given) == len(wanted) and all(
        b is None or a == b for a, b in zip(given[1:], wanted[1:], strict=True)
    )


def _shapes(inputs):
    shapes = keras.tree.map_structure(lambda each: f"{each.dtype}{list(each.shape)}", inputs)
    return str(shapes).replace("'", "")
