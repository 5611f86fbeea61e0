"""Labels that accuracy is measured with, and those that are refused."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_learnbits as klb
from keras_learnbits.calibration.inference import Predictor
from keras_learnbits.quantization import quantize as module
from keras_learnbits.quantization.accuracy import Accuracy

X = np.random.default_rng(0).normal(size=(40, 4)).astype("float32")


def classifier(classes, activation=None):
    keras.utils.set_random_seed(0)
    layers = [keras.Input((4,)), keras.layers.Dense(classes, activation=activation)]
    return keras.Sequential(layers)


NET, ONE_OUTPUT = classifier(3), classifier(1)
# The model's own classes, of which 30 of 40 are kept.
CLASSES = NET.predict(X, verbose=0).argmax(axis=-1)
CLASSES[:10] = (CLASSES[:10] + 1) % 3
ONE_HOT = np.eye(3)[CLASSES]


class Batches(keras.utils.PyDataset):
    def __init__(self, count):
        super().__init__()
        self.count = count

    @property
    def num_batches(self):
        return self.count

    def __getitem__(self, index):
        rows = slice(10 * index, 10 * index + 10)
        return X[rows], CLASSES[rows]


def dataset(labels):
    return tf.data.Dataset.from_tensor_slices((X, labels))


@pytest.mark.parametrize(
    "data",
    [
        (X, CLASSES),
        (X, CLASSES.tolist()),
        (X, CLASSES[:, None].astype("float32")),
        (X, ONE_HOT),
        (X, 0.9 * ONE_HOT + 0.1 / 3, np.ones(40)),
        dataset(CLASSES).batch(7),
        [(X[:30], CLASSES[:30]), (X[30:], CLASSES[30:])],
        Batches(4),
    ],
    ids=lambda data: type(data).__name__,
)
def test_the_accuracy_is_the_share_of_the_labels_that_a_model_predicts(data):
    accuracy = Accuracy(data, NET)
    assert accuracy(Predictor(NET)) == 0.75
    assert accuracy(Predictor(NET)) == 0.75


@pytest.mark.parametrize(
    ("activation", "low"), [(None, 0), (None, -1), ("sigmoid", 0), ("tanh", 0), ("tanh", -1)]
)
def test_single_outputs_have_two_classes(activation, low):
    net = classifier(1, activation)
    net.layers[0].set_weights(ONE_OUTPUT.layers[0].get_weights())
    logits = ONE_OUTPUT.predict(X, verbose=0)
    labels = np.where(logits > 0, 1, low)
    labels[:10] = 1 + low - labels[:10]
    assert Accuracy((X, labels), net)(Predictor(net)) == 0.75


TWO_LABELS = ONE_HOT + np.roll(ONE_HOT, 1, axis=-1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((X, CLASSES + 1), "must be class numbers from 0 to 2, or one-hot.*from 1 to 3"),
        ((X, CLASSES - 0.5), r"Received: float64 of shape \(40,\), from -0.5 to 1.5"),
        ((X, TWO_LABELS), r"one-hot rows of 3 numbers.*no classifiers.*\(40, 3\), from 0 to 1"),
        ((X, TWO_LABELS / 2), "one-hot rows"),
        ((X, np.zeros((40, 3))), "one-hot rows"),
        ((X, X), r"one-hot rows.*Received: float32 of shape \(40, 4\)"),
        ((X, CLASSES[:30]), "one label for each example.*Received: 30 labels, 40 examples"),
        ((X[:30], CLASSES), "one label for each example.*Received: 40 labels, 30 examples"),
        ([(X[:30], CLASSES[:30]), (X[30:], CLASSES)], "Received: 40 labels, 10 examples"),
        (dataset(CLASSES), "batch a dataset of single examples"),
        (dataset(ONE_HOT), "batch a dataset of single examples. Received: 3 labels, 4 examples"),
        (dataset(CLASSES).batch(7).repeat(), r"without `repeat\(\)`.*Received: an endless"),
        (Batches(None), "Received: an endless Batches"),
        (iter([(X, CLASSES)]), "read several times.*Received: list_iterator"),
        ((X, np.full(40, "cat")), "must be arrays of numbers"),
        ((X[:, :3], CLASSES), r"`validation_data` must be inputs.*Received: float32\[40, 3\]"),
        ((np.where(X[0, 0] == X, np.nan, X), CLASSES), "`validation_data` must be finite"),
        ((X[:0], CLASSES[:0]), "must have examples"),
        ([], "must have examples"),
        (7, "object of type int"),
        ((X, (CLASSES + 1) % 3), "must be less than the accuracy of the float model.*belong"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else type(value).__name__,
)
def test_labels_that_are_no_classes_are_refused_before_work_starts(data, message, monkeypatch):
    monkeypatch.setattr(
        module.MeasuredWidths, "loss_table", lambda *args: pytest.fail("work has started")
    )
    with pytest.raises(ValueError, match=message):
        klb.quantize(NET, X, max_accuracy_drop=0.26, validation_data=data, steps=0, verbose=0)


@pytest.mark.parametrize(
    "labels", [np.linspace(0, 1, 40), np.arange(40) % 3, np.eye(2)[CLASSES % 2]]
)
def test_labels_of_single_outputs_that_are_not_two_are_refused(labels):
    with pytest.raises(ValueError, match="must be 0 and 1, or -1 and 1"):
        Accuracy((X, labels), ONE_OUTPUT)(Predictor(ONE_OUTPUT))
