"""Small models of all kinds of layers with random weights, for the tests of the exporters."""

import keras
import numpy as np
from thorough import thorough

import keras_learnbits as klb
from keras_learnbits.layers.discovery import quantized_kernels, quantized_tensor_of

# Bits and quantizers of `dense_model` that the exporters are tested with.
EVERY_WIDTH = [
    (2, "learned_scale"),
    (5, "min_max"),
    *thorough(
        *((bits, "learned_scale") for bits in (1, 3, 4, 5, 7, 8, 12, 16)),
        *((bits, "min_max") for bits in (1, 2, 3, 4, 7, 8, 12, 16)),
    ),
]


def with_random_weights(model):
    rng = np.random.default_rng(0)
    for variable in model.weights:
        if quantized_tensor_of(variable) is None:
            values = rng.normal(size=variable.shape) * 0.3
            variable.assign(np.abs(values) + 0.1 if "variance" in variable.path else values)
    for kernel in quantized_kernels(model):
        kernel.fit_scale()
    return model


def quantized(layer, name="kernel"):
    """A layer's quantized kernel, an array."""
    return layer.quantized_kernels[name].quantized().numpy()


def dense_model(bits, kernel_quantizer="learned_scale", units=16):
    arguments = {"bits": bits, "max_bits": 16, "kernel_quantizer": kernel_quantizer}
    inputs = keras.Input((12,), name="x")
    x = klb.LearnedBitDense(units, activation="relu", name="hidden", **arguments)(inputs)
    outputs = klb.LearnedBitDense(3, name="head", **arguments)(x)
    return with_random_weights(klb.LearnedBitModel(inputs, outputs))


def image_model(kernel_quantizer="learned_scale", transposed=True):
    def settings(bits, name):
        return {"bits": bits, "kernel_quantizer": kernel_quantizer, "name": name}

    inputs = keras.Input((8, 8, 3), name="image")
    x = klb.LearnedBitConv2D(6, 3, padding="same", **settings(2, "conv"))(inputs)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.ReLU()(x)
    x = klb.LearnedBitDepthwiseConv2D(3, depth_multiplier=2, **settings(3, "depthwise"))(x)
    x = klb.LearnedBitSeparableConv2D(5, 3, **settings(4, "separable"))(x)
    if transposed:
        x = klb.LearnedBitConv2DTranspose(4, 3, strides=2, **settings(5, "transposed"))(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    outputs = klb.LearnedBitDense(7, **settings(1, "dense"))(x)
    return with_random_weights(klb.LearnedBitModel(inputs, outputs))


def normalized_model():
    """A model with constants that are not weights, and with quantized activations."""
    inputs = keras.Input((6,), name="x")
    x = keras.layers.Normalization(mean=0.3, variance=2.0)(inputs)
    x = klb.LearnedBitActivation(bits=4)(x)
    x = klb.LearnedBitDense(16, activation="relu", bits=2, name="hidden")(x)
    x = klb.LearnedBitActivation(bits=3)(x)
    outputs = klb.LearnedBitDense(3, bits=3, name="head")(x)
    model = with_random_weights(klb.LearnedBitModel(inputs, outputs))
    model(np.random.default_rng(1).normal(size=(64, 6)), training=True)  # fits the ranges
    return model


def branched_model():
    """A model of two branches; in plain Keras the one with an activation is deeper."""
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    x = klb.LearnedBitActivation(bits=8)(klb.LearnedBitDense(4, name="b1")(b))
    x = klb.LearnedBitDense(4, name="b2")(x)
    y = keras.layers.BatchNormalization()(klb.LearnedBitDense(4, name="a1")(a))
    y = keras.layers.Dropout(0.1)(keras.layers.ReLU()(y))
    model = with_random_weights(klb.LearnedBitModel([a, b], keras.layers.Add()([x, y])))
    inputs = np.random.default_rng(0).normal(size=(2, 64, 4)).astype("float32")
    model(list(inputs), training=True)
    return model


def volume_model():
    inputs = keras.Input((5, 5, 5, 2), name="volume")
    x = klb.LearnedBitConv3D(4, 3, bits=2)(inputs)
    return with_random_weights(klb.LearnedBitModel(inputs, x))


def text_model():
    inputs = keras.Input((9,), dtype="int32", name="tokens")
    x = klb.LearnedBitEmbedding(20, 8, bits=3, name="embedding")(inputs)
    attention = keras.layers.MultiHeadAttention(2, 4)
    x = klb.LearnedBitWrapper(attention, bits=4, name="attention")(x, x)
    x = keras.layers.LayerNormalization()(x)
    x = klb.LearnedBitEinsumDense("abc,cd->abd", (None, 5), bits=8, name="einsum")(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return with_random_weights(klb.LearnedBitModel(inputs, klb.LearnedBitDense(3, bits=2)(x)))


def recurrent_model():
    inputs = keras.Input((7, 5), name="sequence")
    x = klb.LearnedBitConv1D(4, 3, bits=2)(inputs)
    x = klb.LearnedBitWrapper(keras.layers.LSTM(6), bits=4, name="recurrent")(x)
    return with_random_weights(klb.LearnedBitModel(inputs, klb.LearnedBitDense(3, bits=2)(x)))


def converted_model():
    """A Sequential that was built and never called."""
    layers = [keras.Input((6,), name="x"), keras.layers.Dense(8, "relu"), keras.layers.Dense(3)]
    return with_random_weights(klb.to_learned_bits(keras.Sequential(layers), bits=3))


def inputs_for(model, examples=4):
    (given,) = model.inputs
    shape = (examples, *given.shape[1:])
    rng = np.random.default_rng(1)
    if given.dtype == "int32":
        return rng.integers(0, 20, shape).astype("int32")
    return rng.normal(size=shape).astype("float32")
