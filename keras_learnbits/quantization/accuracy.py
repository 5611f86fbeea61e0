"""Accuracy of a classifier on labelled examples."""

import keras
import numpy as np

from keras_learnbits.calibration.examples import batches_in, check_can_be_read_again
from keras_learnbits.calibration.inference import batches_of
from keras_learnbits.calibration.model_inputs import as_inputs, as_numbers, check_call

ARGUMENT = "validation_data"


class Accuracy:
    """Share of examples that a model classifies correctly.

    Labels may be class numbers or one-hot rows. If there is one output per example, a probability
    or a logit, labels are 0 and 1, or -1 and 1.

    Args:
        data: Tuple `(x, y)` of arrays, or a dataset of batches `(x, y)`.
        model: The Keras model that takes the inputs.

    Raises:
        ValueError: There are no labels, not one for each example, or the data cannot be read
            repeatedly to their end.
    """

    def __init__(self, data, model):
        if data is None:
            raise ValueError(
                "`max_accuracy_drop` needs labelled `validation_data`, which must not be the test "
                "set. Received: validation_data=None"
            )
        check_can_be_read_again(data, ARGUMENT)
        if isinstance(data, tuple):
            data = _numbers(data)
        self._data = data
        self._model = model

    def __call__(self, predict):
        """The accuracy of a model, a number from 0 to 1.

        Args:
            predict: Function of inputs to outputs, such as a `Predictor`.

        Raises:
            ValueError: The model does not take the inputs, has other outputs than one row of
                classes per example, or the labels are no classes.
        """
        outputs, labels = [], []
        for inputs, classes in self._batches():
            if not len(classes):
                continue
            inputs = as_inputs(inputs, self._model, ARGUMENT)
            if not outputs:
                check_call(inputs, self._model, ARGUMENT)
            found = predict(inputs)
            if not isinstance(found, np.ndarray) or found.ndim != 2:
                shapes = keras.tree.map_structure(lambda each: each.shape, found)
                raise ValueError(
                    "An accuracy needs a classifier with one output of shape (batch_size, "
                    f"classes); quantize others to a size. Received: outputs of shape {shapes}"
                )
            outputs.append(found)
            labels.append(classes)
        if not outputs:
            raise ValueError("`validation_data` must have examples. Received: none")
        return float(np.mean(_hits(np.concatenate(outputs), np.concatenate(labels))))

    def _batches(self):
        """Iterator over pairs of the inputs and the labels of a batch."""
        if isinstance(self._data, tuple):
            return batches_of(self._data)
        return map(_numbers, batches_in(self._data, ARGUMENT))


def lowest_accuracy(float_accuracy, max_drop):
    """The lowest accuracy that is accepted.

    Raises:
        ValueError: Any model would be accurate enough.
    """
    if float_accuracy <= max_drop:
        raise ValueError(
            "`max_accuracy_drop` must be less than the accuracy of the float model, or else any "
            "model is accurate enough; check that labels and inputs of `validation_data` belong "
            f"together. Received: max_accuracy_drop={max_drop}, accuracy {float_accuracy:.4f}"
        )
    return float_accuracy - max_drop


def _numbers(batch):
    """The inputs and the labels of a batch, as arrays of one length."""
    if not isinstance(batch, tuple) or len(batch) < 2:
        raise ValueError(
            "`validation_data` must be examples with labels, `(x, y)`. "
            f"Received: batches of type {type(batch).__name__}"
        )
    inputs = keras.tree.map_structure(lambda each: as_numbers(each, ARGUMENT), batch[0])
    labels = as_numbers(batch[1], ARGUMENT)
    sizes = {len(each) for each in keras.tree.flatten(inputs)}
    if sizes != {len(labels)}:
        raise ValueError(
            "`validation_data` must have one label for each example; batch a dataset of single "
            f"examples. Received: {len(labels)} labels, {' and '.join(map(str, sizes))} examples"
        )
    return inputs, labels


def _hits(outputs, labels):
    if outputs.shape[-1] == 1:
        return _binary_hits(outputs[:, 0], labels)
    return outputs.argmax(axis=-1) == _class_numbers(labels, outputs.shape[-1])


def _binary_hits(outputs, labels):
    values = set(np.unique(labels))
    if labels.size != len(outputs) or not (values <= {0, 1} or values <= {-1, 1}):
        raise _no_classes(labels, "0 and 1, or -1 and 1, for a model with one output per example")
    are_probabilities = outputs.min() >= 0 and outputs.max() <= 1 and -1 not in values
    threshold = 0.5 if are_probabilities else 0.0
    return (outputs > threshold) == (labels.reshape(len(labels)) > 0)


def _class_numbers(labels, classes):
    """Class numbers of class numbers or one-hot rows."""
    if labels.shape == (len(labels), classes):
        ordered = np.sort(np.asarray(labels, "float64"), axis=-1)
        has_one_maximum = ordered[:, -1] > ordered[:, -2]
        has_sum_one = np.abs(ordered.sum(axis=-1) - 1) < 1e-3
        if np.all(has_one_maximum & has_sum_one & (ordered[:, 0] >= 0)):
            return labels.argmax(axis=-1)
    elif labels.size == len(labels):
        numbers = labels.reshape(len(labels))
        if np.all(np.isin(numbers, np.arange(classes))):
            return numbers
    raise _no_classes(
        labels, f"class numbers from 0 to {classes - 1}, or one-hot rows of {classes} numbers"
    )


def _no_classes(labels, rule):
    return ValueError(
        f"The labels of `validation_data` must be {rule}; quantize models that are no classifiers "
        f"to a size, without `validation_data`. Received: {labels.dtype} of shape {labels.shape}, "
        f"from {labels.min():g} to {labels.max():g}"
    )
