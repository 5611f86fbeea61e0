"""Tasks of the gallery: nets, data, losses and metrics.

Data are made from MNIST and CIFAR-10, so they are not a benchmark: results cannot be compared with
published figures. Test data are made from the test sets. `speech.py` makes the words.
"""

import dataclasses
from collections.abc import Callable

import keras
import numpy as np
from loading import load_tfds
from speech import spoken_words

L = keras.layers


@dataclasses.dataclass(frozen=True)
class Task:
    """One entry of the gallery.

    Attributes:
        build: Function without arguments that returns a float model.
        data: Function of a number of training examples and a data directory that returns
            `(x, y), (x_test, y_test)`.
        compile: Dictionary of arguments of `compile`, without the optimizer.
        score: Function of outputs and labels that returns a dictionary of metrics, the
            most important first.
        epochs: Number of epochs.
        examples: Number of training examples.
    """

    build: Callable
    data: Callable
    compile: dict
    score: Callable
    epochs: int
    examples: int


def digits_and_scenes(data_dir):
    """MNIST's digits without margin, their classes, and CIFAR images, for training and for test."""
    digits, scenes = load_tfds("mnist", data_dir), load_tfds("cifar10", data_dir)
    return [
        (x[:, 4:24, 4:24, 0].astype("float32") / 255, y, images.astype("float32") / 255)
        for (x, y), (images, _) in zip(digits, scenes, strict=True)
    ]


def pasted(canvas, digit, rng, opacity):
    """Pastes a digit of a random color at a random position; returns its slices."""
    row, column = (
        rng.integers(0, size - edge + 1)
        for size, edge in zip(canvas.shape[:2], digit.shape, strict=True)
    )
    place = slice(row, row + digit.shape[0]), slice(column, column + digit.shape[1])
    share = opacity * digit[..., None]
    canvas[place] = (1 - share) * canvas[place] + share * rng.uniform(0, 1, 3)
    return place


def noisy(images, rng, deviation=0.05):
    noise = rng.normal(0, deviation, images.shape)
    return np.clip(images + noise, 0, 1).astype("float32")


# Segmentation


def segmentation_data(examples, data_dir):
    """Two digits, half transparent, on each CIFAR image; labels are masks of their pixels."""
    rng = np.random.default_rng(0)
    sets = []
    for number, (digits, _, scenes) in zip(
        (examples, 2000), digits_and_scenes(data_dir), strict=True
    ):
        images = scenes[rng.integers(len(scenes), size=number)]
        masks = np.zeros((*images.shape[:3], 1), "float32")
        for image, mask in zip(images, masks, strict=True):
            for digit in digits[rng.integers(len(digits), size=2)]:
                place = pasted(image, digit, rng, opacity=0.6)
                mask[..., 0][place] = np.maximum(mask[..., 0][place], digit > 0.5)
        sets.append((noisy(images, rng), masks))
    return sets


def unet():
    """A U-Net (arXiv 1505.04597) of three levels."""

    def block(x, filters):
        for _ in range(2):
            x = L.Conv2D(filters, 3, padding="same", use_bias=False)(x)
            x = L.Activation("relu")(L.BatchNormalization()(x))
        return x

    x = inputs = keras.Input((32, 32, 3))
    skipped = []
    for filters in (16, 32):
        x = block(x, filters)
        skipped.append(x)
        x = L.MaxPooling2D()(x)
    x = block(x, 64)
    for filters, skip in ((32, skipped[1]), (16, skipped[0])):
        x = L.Conv2DTranspose(filters, 2, strides=2)(x)
        x = block(L.Concatenate()([skip, x]), filters)
    return keras.Model(inputs, L.Conv2D(1, 1, activation="sigmoid")(x), name="unet")


def segmentation_score(outputs, masks):
    """Intersection over union of the digits' pixels, and the share of right pixels."""
    found, true = outputs > 0.5, masks > 0.5
    return {
        "IoU": float((found & true).sum() / (found | true).sum()),
        "pixel accuracy": float((found == true).mean()),
    }


# Keyword spotting


def keyword_net():
    """DS-CNN with 64 channels ("Hello Edge", arXiv 1711.07128), on log-mel spectrograms."""
    x = inputs = keras.Input((40, 51, 1))
    x = L.Conv2D(64, (4, 10), strides=2, padding="same", use_bias=False)(x)
    x = L.Activation("relu")(L.BatchNormalization()(x))
    for _ in range(4):
        x = L.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
        x = L.Activation("relu")(L.BatchNormalization()(x))
        x = L.Conv2D(64, 1, use_bias=False)(x)
        x = L.Activation("relu")(L.BatchNormalization()(x))
    x = L.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, L.Dense(10, activation="softmax")(x), name="ds_cnn")


def accuracy_score(outputs, labels):
    return {"accuracy": float((outputs.argmax(axis=1) == labels).mean())}


# Autoencoder


def images_as_labels(examples, data_dir):
    """MNIST's images, which are their own labels."""
    return [
        (x[:most].astype("float32") / 255,) * 2
        for (x, _), most in zip(load_tfds("mnist", data_dir), (examples, None), strict=True)
    ]


def autoencoder():
    """A convolutional autoencoder with a code of 32 numbers."""
    x = inputs = keras.Input((28, 28, 1))
    x = L.Conv2D(16, 3, strides=2, padding="same", activation="relu")(x)
    x = L.Conv2D(32, 3, strides=2, padding="same", activation="relu")(x)
    x = L.Dense(32, name="code")(L.Flatten()(x))
    x = L.Reshape((7, 7, 32))(L.Dense(7 * 7 * 32, activation="relu")(x))
    x = L.Conv2DTranspose(16, 3, strides=2, padding="same", activation="relu")(x)
    x = L.Conv2DTranspose(1, 3, strides=2, padding="same", activation="sigmoid")(x)
    return keras.Model(inputs, x, name="autoencoder")


def reconstruction_score(outputs, images):
    """Mean squared error of pixels, divided by their variance around the mean image."""
    error = np.mean(np.square(outputs - images))
    return {"error / variance": float(error / images.var(axis=0).mean())}


# Transformer


@keras.saving.register_keras_serializable(package="gallery")
class AddPositions(L.Layer):
    """Adds a learned vector to each position of a sequence."""

    def build(self, shape):
        self.positions = L.Embedding(shape[1], shape[2])
        self.positions.build((shape[1],))

    def call(self, x):
        return x + self.positions(keras.ops.arange(x.shape[1]))


def classified_digits(examples, data_dir):
    (x, y), (x_test, y_test) = load_tfds("mnist", data_dir)
    return [
        (x[:examples].astype("float32") / 255, y[:examples].astype("int32")),
        (x_test.astype("float32") / 255, y_test.astype("int32")),
    ]


def vision_transformer():
    """Two encoder blocks over 49 patches of 4 by 4 pixels (after ViT, arXiv 2010.11929)."""
    x = inputs = keras.Input((28, 28, 1))
    x = L.Conv2D(64, 4, strides=4, name="patches")(x)
    x = AddPositions(name="positions")(L.Reshape((49, 64))(x))
    for block in (1, 2):
        y = L.LayerNormalization()(x)
        y = L.MultiHeadAttention(4, 16, name=f"attention{block}")(y, y)
        x = L.Add()([x, y])
        y = L.LayerNormalization()(x)
        y = L.Dense(64)(L.Dense(256, activation="gelu")(y))
        x = L.Add()([x, y])
    x = L.GlobalAveragePooling1D()(L.LayerNormalization()(x))
    return keras.Model(inputs, L.Dense(10, activation="softmax")(x), name="vit")


CLASSES = {"loss": "sparse_categorical_crossentropy"}
TASKS = {
    "segmentation": Task(
        unet,
        segmentation_data,
        {"loss": "binary_crossentropy"},
        segmentation_score,
        epochs=8,
        examples=5000,
    ),
    "keywords": Task(
        keyword_net,
        lambda examples, data_dir: spoken_words(examples),
        CLASSES,
        accuracy_score,
        epochs=10,
        examples=4000,
    ),
    "autoencoder": Task(
        autoencoder,
        images_as_labels,
        {"loss": "binary_crossentropy"},
        reconstruction_score,
        epochs=5,
        examples=30000,
    ),
    "transformer": Task(
        vision_transformer,
        classified_digits,
        CLASSES,
        accuracy_score,
        epochs=5,
        examples=20000,
    ),
}
