"""Seeds, policies, two virtual CPUs, and a small problem to train on."""

import gc
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_learnbits as klb

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)


@pytest.fixture(autouse=True)
def fresh_keras():
    """Each test starts with the same seeds, in float32, with no names taken."""
    keras.utils.clear_session()  # collects garbage, too
    # TensorFlow never frees graphs with a custom gradient; garbage collection should skip them.
    gc.freeze()
    keras.utils.set_random_seed(1)
    keras.config.set_dtype_policy("float32")
    yield
    keras.config.set_dtype_policy("float32")


@pytest.fixture(scope="session")
def strategy():
    """Two replicas on two virtual CPUs, shared by all tests: collectives belong to a process."""
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


@pytest.fixture
def data():
    """64 examples of a linear problem: `(x, y)` of shapes (64, 6) and (64, 2)."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 6)).astype("float32")
    return x, (x @ rng.normal(size=(6, 2))).astype("float32")


@pytest.fixture
def make_model():
    """A function that makes a small `LearnedBitModel` of two layers, not compiled."""

    def make(**layer_arguments):
        inputs = keras.Input((6,))
        x = klb.LearnedBitDense(8, activation="relu", name="hidden", **layer_arguments)(inputs)
        return klb.LearnedBitModel(inputs, klb.LearnedBitDense(2, name="head")(x))

    return make
