"""Functions that tests of packed files share."""

import keras
import numpy as np

from keras_learnbits.layers.discovery import quantized_kernels


def disturb(model, seed=0):
    """Sets other weights and scales, so that no value is an initial one."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        if "float" in variable.dtype and variable.name.rpartition("_")[2] != "bits":
            variable.assign(variable + rng.normal(size=variable.shape) / 5)


def quantized_arrays(model):
    return [kernel.quantized().numpy() for kernel in quantized_kernels(model)]


def assert_same_bits(array, other):
    assert array.dtype == other.dtype == np.float32
    np.testing.assert_array_equal(array.view("uint32"), other.view("uint32"))


def predictions(model, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 9, (4, *model.input.shape[1:])).astype("float32")
    return [np.asarray(y) for y in keras.tree.flatten(model(x))]


def assert_same_predictions(model, other):
    for ours, theirs in zip(predictions(model), predictions(other), strict=True):
        assert_same_bits(ours, theirs)
