"""Example inputs from arrays, datasets and generators, checked before work starts."""

import itertools

import keras
import numpy as np
import tensorflow as tf

from keras_learnbits.calibration.inference import rows, size_of
from keras_learnbits.calibration.model_inputs import (
    as_inputs,
    as_numbers,
    check_call,
    described,
    is_arrays,
    numbers_per_example,
)

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
            are taken. No others are read or converted.
        seed: Integer, the seed of the random sample and order.

    Returns:
        Structure of NumPy arrays in the model's structure of inputs, all of one length, of the
        types that the model takes.

    Raises:
        ValueError: There are fewer than eight examples, or some are not numbers; or the model does
            not take them.
    """
    inputs = without_labels(data)
    # Data may be sorted, and the first examples are used to represent all of them.
    rng = np.random.default_rng(seed)
    if is_arrays(inputs):
        inputs = keras.tree.map_structure(lambda each: as_numbers(each, "data"), inputs)
        order = rng.permutation(_checked_size(inputs))[: most_examples(inputs, most)]
        inputs = as_inputs(rows(inputs, order), model, "data")
    else:
        inputs = _first_examples(data, model, most)
        order = rng.permutation(_checked_size(inputs))
        for each in keras.tree.flatten(inputs):
            _reorder(each, order)
    check_call(inputs, model, "data")
    return inputs


def without_labels(data):
    """The inputs of data or of a batch, in which labels may follow."""
    return data[0] if isinstance(data, tuple) and data else data


def most_examples(inputs, most):
    """How many examples are kept: at most `most`, with at most `MOST_NUMBERS` numbers.

    Args:
        inputs: Structure of arrays.
        most: Integer.

    Raises:
        ValueError: The examples have no numbers.
    """
    numbers = numbers_per_example(inputs)
    if not numbers:
        raise ValueError(f"`data` must have numbers in each example. Received: {described(inputs)}")
    return max(min(most, MOST_NUMBERS // numbers), FEWEST)


def batches_in(data, argument):
    """Iterator over the batches of a dataset, a generator or another iterable.

    Args:
        data: The dataset.
        argument: Name of the argument, for the error.
    """
    if isinstance(data, keras.utils.PyDataset):
        number = data.num_batches
        return (data[index] for index in (itertools.count() if number is None else range(number)))
    try:
        return iter(data)
    except TypeError:
        raise ValueError(
            f"`{argument}` must be an array, a structure of arrays, or a dataset or generator of "
            f"batches. Received: an object of type {type(data).__name__}"
        ) from None


def check_can_be_read_again(data, argument):
    """Raises a ValueError unless data can be read repeatedly, each time to an end.

    Args:
        data: Arrays, dataset or other iterable.
        argument: Name of the argument, for the error.
    """
    if batches_in(data, argument) is data:
        raise ValueError(
            f"`{argument}` are read several times: give arrays `(x, y)` or a dataset, no generator "
            f"or iterator. Received: {type(data).__name__}"
        )
    endless_dataset = isinstance(data, tf.data.Dataset) and (
        int(data.cardinality()) == tf.data.INFINITE_CARDINALITY
    )
    if endless_dataset or (isinstance(data, keras.utils.PyDataset) and data.num_batches is None):
        raise ValueError(
            f"`{argument}` are read to their end: give a dataset without `repeat()`, or with "
            f"`take(batches)`. Received: an endless {type(data).__name__}"
        )


def _checked_size(inputs):
    lengths = {len(each) for each in keras.tree.flatten(inputs)}
    if len(lengths) != 1 or min(lengths) < FEWEST:
        raise ValueError(
            f"`data` must have at least {FEWEST} examples, the same number for each input. "
            f"Received: {described(inputs)}"
        )
    return min(lengths)


def _first_examples(data, model, most):
    """The first examples of batches; memory is for these and for one batch."""
    kept, shapes, count, limit = None, None, 0, 1
    for batch in batches_in(data, "data"):
        inputs = without_labels(batch)
        inputs = keras.tree.map_structure(lambda each: as_numbers(each, "data"), inputs)
        found = [each.shape[1:] for each in keras.tree.flatten(inputs)]
        if shapes not in (None, found):
            raise ValueError(
                "`data` must be batches of one shape, apart from the number of examples; pad "
                f"sequences to one length. Received: examples of shapes {shapes} and {found}"
            )
        inputs = as_inputs(inputs, model, "data")
        if kept is None:
            shapes, limit = found, most_examples(inputs, most)
            kept = keras.tree.map_structure(
                lambda each, limit=limit: np.empty((limit, *each.shape[1:]), each.dtype), inputs
            )
        inputs = rows(inputs, slice(limit - count))
        if len({len(each) for each in keras.tree.flatten(inputs)}) != 1:
            raise ValueError(
                "`data` must have the same number of examples for each input. "
                f"Received: a batch of {described(inputs)}"
            )
        end = count + size_of(inputs)
        for whole, part in zip(keras.tree.flatten(kept), keras.tree.flatten(inputs), strict=True):
            whole[count:end] = part
        count = end
        if count >= limit:  # an endless generator ends here
            break
    if kept is None:
        raise ValueError("`data` must have examples. Received: a dataset or generator without any")
    return rows(kept, slice(count))


def _reorder(array, order):
    """Makes `array` what `array[order]` is, without a second array."""
    for place, origin in enumerate(order):
        while origin < place:  # it was moved when its own place was filled
            origin = order[origin]
        array[[place, origin]] = array[[origin, place]]
