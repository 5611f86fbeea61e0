"""Learned bits on CIFAR-10.

TFDS_DATA_DIR=... python experiments/cifar10.py --bit_reg=1e-3

`--bit_gradient=paper` is the published method (arXiv 1708.04788) with its dense net.
"""

import common
import keras
import tensorflow as tf
from loading import load_tfds


def load(data_dir):
    return load_tfds("cifar10", data_dir)


def augment(images, seed, shift=4):
    """Flips half of the images and shifts each by up to `shift` pixels, edges reflected."""
    batch, (height, width, channels) = tf.shape(images)[0], images.shape[1:]

    def draw(salt, low, high):
        return tf.random.stateless_uniform((batch, 1), seed + salt, low, high, tf.int32)

    def shifted(size, by):
        return size - 1 - tf.abs(size - 1 - tf.abs(tf.range(size) + by))

    rows = shifted(height, draw(0, -shift, shift + 1))
    columns = shifted(width, draw(1, -shift, shift + 1))
    flip = draw(2, 0, 2) == 1
    columns = tf.where(flip, width - 1 - columns, columns)
    pixels = tf.reshape(rows[:, :, None] * width + columns[:, None, :], (batch, -1))
    images = tf.reshape(images, (batch, height * width, channels))
    images = tf.gather(images, pixels, axis=1, batch_dims=1)
    return tf.reshape(images, (batch, height, width, channels))


def cnn(Conv2D, Dense, widths=(32, 128, 128)):
    """Six 3x3 convolutions that pool early and widen late, 0.5 M weights.

    The layout of Keller Jordan's cifar10-airbench at half its width.
    """
    layers = keras.layers
    inputs = keras.Input((32, 32, 3))
    x = layers.Normalization(mean=(0.4914, 0.4822, 0.4465), variance=(0.061, 0.059, 0.068))(inputs)
    x = Conv2D(24, 2, activation="relu", name="stem")(x)
    for block, width in enumerate(widths, 1):
        for half in "ab":
            x = Conv2D(width, 3, padding="same", use_bias=False, name=f"conv{block}{half}")(x)
            x = layers.MaxPooling2D()(x) if half == "a" else x
            x = layers.BatchNormalization(momentum=0.8, name=f"norm{block}{half}")(x)
            x = layers.Activation("relu")(x)
    x = layers.GlobalMaxPooling2D()(x)
    return inputs, Dense(10, dtype="float32", name="head")(x)


def lenet(Conv2D, Dense):
    """The paper's net: 256 and 512 filters of 3x3, 1024 units, tanh."""
    layers = keras.layers
    inputs = keras.Input((32, 32, 3))
    x = Conv2D(256, 3, activation="tanh", name="conv1")(inputs)
    x = layers.MaxPooling2D()(x)
    x = Conv2D(512, 3, activation="tanh", name="conv2")(x)
    x = layers.MaxPooling2D()(x)
    x = layers.Flatten()(x)
    x = Dense(1024, activation="tanh", name="dense1")(x)
    return inputs, Dense(10, dtype="float32", name="dense2")(x)


def mlp(Conv2D, Dense):
    """Three dense layers."""
    x = inputs = keras.Input((32, 32, 3))
    x = keras.layers.Flatten()(x)
    x = Dense(1024, activation="relu", name="dense1")(x)
    x = Dense(512, activation="relu", name="dense2")(x)
    return inputs, Dense(10, dtype="float32", name="dense3")(x)


PROBLEM = common.Problem(
    load=load,
    nets={"cnn": cnn, "lenet": lenet, "mlp": mlp},
    defaults={
        "epochs": 16,
        "batch_size": 256,
        "learning_rate": 5e-3,
        "bit_reg": 1e-3,
        "dtype_policy": "mixed_bfloat16",
    },
    published={"model": "lenet", "epochs": 100},
    augment=augment,
    label_smoothing=0.1,
    weight_decay=0.05,
)

if __name__ == "__main__":
    common.run(PROBLEM)
