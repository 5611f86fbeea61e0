"""Accuracy of a classifier on labelled examples."""

import keras
import numpy as np

from keras_learnbits.calibration.inference import batches_of


class Accuracy:
    """Share of examples that a model classifies correctly.

    Labels may be class numbers or one-hot rows. If there is one output per example, a probability
    or a logit, labels are 0 and 1.

    Args:
        data: Tuple `(x, y)` of arrays, or a dataset of batches `(x, y)`.

    Raises:
        ValueError: There are no labels, or the data can be read once only.
    """

    def __init__(self, data):
        if data is None:
            raise ValueError(
                "`max_accuracy_drop` needs labelled `validation_data`, which must not be the test "
                "set. Received: validation_data=None"
            )
        if iter(data) is data:
            raise ValueError(
                "`validation_data` are read several times: give arrays `(x, y)` or a dataset. "
                f"Received: {type(data).__name__}"
            )
        if isinstance(data, tuple):
            arrays = keras.tree.map_structure(np.asarray, data[:2])
            data = batches_of(arrays) if len(arrays) == 2 else [arrays[0]]
        self.data = data

    def __call__(self, predict):
        """The accuracy of a model, a number from 0 to 1.

        Args:
            predict: Function of inputs to outputs, such as a `Predictor`.
        """
        outputs, labels = [], []
        for batch in self.data:
            if not isinstance(batch, tuple) or len(batch) < 2:
                raise ValueError(
                    "`validation_data` must be examples with labels, `(x, y)`. "
                    f"Received: batches of type {type(batch).__name__}"
                )
            found = predict(keras.tree.map_structure(np.asarray, batch[0]))
            if not isinstance(found, np.ndarray) or found.ndim != 2:
                shapes = keras.tree.map_structure(lambda each: each.shape, found)
                raise ValueError(
                    "An accuracy needs a classifier with one output of shape (batch_size, "
                    f"classes); quantize others to a size. Received: outputs of shape {shapes}"
                )
            outputs.append(found)
            labels.append(np.asarray(batch[1]))
        if not outputs:
            raise ValueError("`validation_data` must have examples. Received: none")
        return float(np.mean(_hits(np.concatenate(outputs), np.concatenate(labels))))


def _hits(outputs, labels):
    if outputs.shape[-1] == 1:
        threshold = 0.5 if outputs.min() >= 0 and outputs.max() <= 1 else 0.0
        return (outputs[:, 0] > threshold) == (labels.reshape(len(labels)) > 0.5)
    if labels.ndim == 2 and labels.shape[-1] == outputs.shape[-1]:
        labels = labels.argmax(axis=-1)
    return outputs.argmax(axis=-1) == labels.reshape(len(labels))
