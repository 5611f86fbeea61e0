"""Learned bits on MNIST, and the published method on MNIST.

TFDS_DATA_DIR=... python experiments/mnist.py
TFDS_DATA_DIR=... python experiments/mnist.py --bit_gradient=paper

`--bit_gradient=paper` is the method of Raghavan et al., "BitNet: Bit-Regularized Deep Neural
Networks" (arXiv 1708.04788), with their net, data, schedule, prices and quantizer;
`--model=lenet32_8` is their deepest net.
"""

import functools

import common
import keras
from loading import load_tfds, shifted
from recipes import fast_policy


def load(data_dir):
    return load_tfds("mnist", data_dir)


def lenet(Conv2D, Dense):
    """LeNet with 1,663,370 parameters; dropout before the last layer."""
    layers = keras.layers
    inputs = keras.Input((28, 28, 1))
    x = Conv2D(32, 5, padding="same", activation="relu", name="conv1")(inputs)
    x = layers.MaxPooling2D()(x)
    x = Conv2D(64, 5, padding="same", activation="relu", name="conv2")(x)
    x = layers.MaxPooling2D()(x)
    x = layers.Flatten()(x)
    x = Dense(512, activation="relu", name="dense1")(x)
    x = layers.Dropout(0.5)(x)
    return inputs, Dense(10, dtype="float32", name="dense2")(x)


def lenet32(Conv2D, Dense):
    """The paper's net: 30 and 50 filters of 5x5, 500 units, tanh."""
    layers = keras.layers
    inputs = keras.Input((28, 28, 1))
    x = Conv2D(30, 5, activation="tanh", name="conv1")(inputs)
    x = layers.MaxPooling2D()(x)
    x = Conv2D(50, 5, activation="tanh", name="conv2")(x)
    x = layers.MaxPooling2D()(x)
    x = layers.Flatten()(x)
    x = Dense(500, activation="tanh", name="dense1")(x)
    return inputs, Dense(10, name="dense2")(x)


# Filters, their size, and whether pooling follows, for all convolutions of the deepest net.
DEEPEST = ((30, 1, False), (30, 3, False), (30, 5, True), (50, 5, True), (50, 5, True))


def deep_lenet32(Conv2D, Dense, depth):
    """The nets of 5 to 8 layers in the paper's Table 1: the last layers of the deepest net.

    The paper does not state the padding; here images keep their size.
    """
    layers = keras.layers
    x = inputs = keras.Input((28, 28, 1))
    for number, (filters, size, pooled) in enumerate(DEEPEST[8 - depth :], 1):
        settings = {"padding": "same", "activation": "tanh"}
        x = Conv2D(filters, size, name=f"conv{number}", **settings)(x)
        x = layers.MaxPooling2D()(x) if pooled else x
    x = layers.Flatten()(x)
    for number in (1, 2):
        x = Dense(500, activation="tanh", name=f"dense{number}")(x)
    return inputs, Dense(10, name="dense3")(x)


DEEP = {f"lenet32_{depth}": functools.partial(deep_lenet32, depth=depth) for depth in (5, 6, 7, 8)}


def logistic(Conv2D, Dense):
    """Logistic regression, which the paper's reviewer compared with."""
    inputs = keras.Input((28, 28, 1))
    return inputs, Dense(10, dtype="float32", name="dense")(keras.layers.Flatten()(inputs))


PROBLEM = common.Problem(
    load=load,
    nets={"lenet": lenet, "lenet32": lenet32, "logistic": logistic, **DEEP},
    defaults={
        "epochs": 12,
        "batch_size": 128,
        "learning_rate": 1e-3,
        "bit_reg": 0.03,
        "dtype_policy": fast_policy(),
    },
    published={"model": "lenet32", "epochs": 30, "train_examples": 50_000},
    augment=functools.partial(shifted, by=2),
)

if __name__ == "__main__":
    common.run(PROBLEM)
