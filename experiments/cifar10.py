"""Learned bits on CIFAR-10.

TFDS_DATA_DIR=... python experiments/cifar10.py --bit_reg=1e-3

`--bit_gradient=paper` is the published method (arXiv 1708.04788) with its net of 4 layers.
"""

import functools

import common
import keras
import numpy as np
from loading import cut_out, load_tfds, shifted
from recipes import fast_policy

# Mean and variance of each channel of the training images.
MEAN, VARIANCE = (0.4914, 0.4822, 0.4465), (0.061, 0.059, 0.068)


def load(data_dir):
    return load_tfds("cifar10", data_dir)


def augment(images, seed):
    return cut_out(shifted(images, seed, by=2, flip=True), seed, size=8)


def cnn(Conv2D, Dense, widths=(48, 192, 192)):
    """A stem and six 3x3 convolutions with early pooling, 1.1 M weights.

    The layout is that of Keller Jordan's cifar10-airbench at three quarters of its width.
    """
    layers = keras.layers
    inputs = keras.Input((32, 32, 3))
    x = layers.Normalization(mean=MEAN, variance=VARIANCE)(inputs)
    x = Conv2D(24, 2, activation="relu", name="stem")(x)
    for block, width in enumerate(widths, 1):
        for half in "ab":
            x = Conv2D(width, 3, padding="same", use_bias=False, name=f"conv{block}{half}")(x)
            x = layers.MaxPooling2D()(x) if half == "a" else x
            x = layers.BatchNormalization(momentum=0.8, name=f"norm{block}{half}")(x)
            x = layers.Activation("relu")(x)
    x = layers.GlobalMaxPooling2D()(x)
    return inputs, Dense(10, dtype="float32", name="head")(x)


def initialize(model, images):
    """Initializes the stem to whiten 2x2 patches, and other convolutions to the identity.

    As in airbench, filters of the stem are the eigenvectors of the patches' covariance divided by
    the roots of their eigenvalues, and their negatives. The first filters of the other convolutions
    copy one channel each.
    """
    images = (images[:5000] / 255 - MEAN) / np.sqrt(VARIANCE)
    patches = np.lib.stride_tricks.sliding_window_view(images, (2, 2), axis=(1, 2))
    patches = patches.transpose(0, 1, 2, 4, 5, 3).reshape(-1, 12)
    values, vectors = np.linalg.eigh(patches.T @ patches / len(patches))
    filters = (vectors / np.sqrt(values + 5e-4)).reshape(2, 2, 3, 12)
    for layer in model.layers:
        if layer.name == "stem":
            layer.kernel.assign(np.concatenate([filters, -filters], axis=-1))
        elif isinstance(layer, keras.layers.Conv2D):
            kernel = keras.ops.convert_to_numpy(layer.kernel).copy()
            channels = min(kernel.shape[2:])
            kernel[..., :channels] = 0
            kernel[1, 1, range(channels), range(channels)] = 1
            layer.kernel.assign(kernel)


def resnet20(Conv2D, Dense):
    """ResNet-20 (arXiv 1512.03385), 0.27 M weights; shortcuts have no weights."""
    layers = keras.layers

    def convolution(x, width, strides, name):
        x = Conv2D(width, 3, strides, padding="same", use_bias=False, name=f"conv{name}")(x)
        return layers.BatchNormalization(momentum=0.9, name=f"norm{name}")(x)

    inputs = keras.Input((32, 32, 3))
    x = layers.Normalization(mean=MEAN, variance=VARIANCE)(inputs)
    x = layers.Activation("relu")(convolution(x, 16, 1, "0"))
    for stage, width in enumerate((16, 32, 64), 1):
        for block in range(1, 4):
            strides = 2 if stage > 1 and block == 1 else 1
            y = layers.Activation("relu")(convolution(x, width, strides, f"{stage}{block}a"))
            y = convolution(y, width, 1, f"{stage}{block}b")
            if strides == 2:
                x = keras.ops.pad(x[:, ::2, ::2], [[0, 0]] * 3 + [[width // 4, width // 4]])
            x = layers.Activation("relu")(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling2D()(x)
    return inputs, Dense(10, dtype="float32", name="head")(x)


def depthwise(Conv2D, Dense, DepthwiseConv2D):
    """Alternating depthwise and pointwise convolutions (MobileNet, arXiv 1704.04861), 0.20 M."""
    layers = keras.layers

    def normalized(x, name):
        return layers.Activation("relu")(layers.BatchNormalization(momentum=0.9, name=name)(x))

    inputs = keras.Input((32, 32, 3))
    x = layers.Normalization(mean=MEAN, variance=VARIANCE)(inputs)
    x = Conv2D(32, 3, padding="same", use_bias=False, name="stem")(x)
    x = normalized(x, "norm_stem")
    blocks = (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (256, 1)
    for block, (width, strides) in enumerate(blocks, 1):
        x = DepthwiseConv2D(3, strides, padding="same", use_bias=False, name=f"depth{block}")(x)
        x = normalized(x, f"norm{block}a")
        x = Conv2D(width, 1, use_bias=False, name=f"point{block}")(x)
        x = normalized(x, f"norm{block}b")
    x = layers.GlobalAveragePooling2D()(x)
    return inputs, Dense(10, dtype="float32", name="head")(x)


def lenet32(Conv2D, Dense):
    """The net of 4 layers in the paper's Table 1: 30 and 50 filters of 3x3, 500 units, tanh."""
    layers = keras.layers
    inputs = keras.Input((32, 32, 3))
    x = Conv2D(30, 3, activation="tanh", name="conv1")(inputs)
    x = layers.MaxPooling2D()(x)
    x = Conv2D(50, 3, activation="tanh", name="conv2")(x)
    x = layers.MaxPooling2D()(x)
    x = layers.Flatten()(x)
    x = Dense(500, activation="tanh", name="dense1")(x)
    return inputs, Dense(10, name="dense2")(x)


def mlp(Conv2D, Dense):
    """Three dense layers."""
    x = inputs = keras.Input((32, 32, 3))
    x = keras.layers.Flatten()(x)
    x = Dense(1024, activation="relu", name="dense1")(x)
    x = Dense(512, activation="relu", name="dense2")(x)
    return inputs, Dense(10, dtype="float32", name="dense3")(x)


# A quarter of airbench's width, 0.13 M weights: less redundant, with a seventh of the arithmetic.
cnn_quarter = functools.partial(cnn, widths=(16, 64, 64))
CNN_SETTINGS = {
    "optimizer": "sgd",
    "learning_rate": 0.4,
    "weight_decay": 5e-3,
    "label_smoothing": 0.2,
}
# ResNets are usually trained on CIFAR-10 with a rate of 0.1, a momentum of 0.9, 5e-4 of L2 and
# batches of 128. With a momentum of 0.85 and this rate, step and decay are as large. Labels are not
# smoothed, because the net is a teacher afterwards (https://arxiv.org/abs/1906.02629).
RESNET_SETTINGS = {
    "epochs": 100,
    "optimizer": "sgd",
    "learning_rate": 0.3,
    "weight_decay": 3e-3,
    "label_smoothing": 0.0,
}
PROBLEM = common.Problem(
    load=load,
    nets={
        "cnn": cnn,
        "cnn_quarter": cnn_quarter,
        "resnet20": resnet20,
        "depthwise": depthwise,
        "lenet32": lenet32,
        "mlp": mlp,
    },
    defaults={
        "epochs": 30,
        "batch_size": 256,
        "learning_rate": 5e-3,
        "weight_decay": 0.05,
        "label_smoothing": 0.1,
        "bit_reg": 1e-3,
        "dtype_policy": fast_policy(),
    },
    settings={"cnn": CNN_SETTINGS, "cnn_quarter": CNN_SETTINGS, "resnet20": RESNET_SETTINGS},
    published={"model": "lenet32", "epochs": 100, "train_examples": 40_000},
    initializers={"cnn": initialize, "cnn_quarter": initialize},
    augment=augment,
)

if __name__ == "__main__":
    common.run(PROBLEM)
