import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_learnbits as klb
from keras_learnbits.layers.discovery import quantized_kernels
from keras_learnbits.numerics import grids


def step_of_bits(model, data, **settings):
    """The change of each layer's bits in one training step, in steps of the bits' optimizer."""
    settings = {"bit_gradient": "straight_through", **settings}
    model.compile(keras.optimizers.SGD(0.0), "mse", bit_optimizer=klb.SignSGD(0.25), **settings)
    before = [float(k.bits) for k in quantized_kernels(model)]
    model.fit(*data, batch_size=64, verbose=0)
    after = [float(k.bits) for k in quantized_kernels(model)]
    return [(b - a) / 0.25 for b, a in zip(after, before, strict=True)]


def test_straight_through_is_the_derivative_at_a_fixed_rounding_residual():
    """Oracle in NumPy: real bits, with each weight's rounding residual in steps held fixed."""
    normal = keras.initializers.RandomNormal(stddev=0.5, seed=0)  # it has tails that are clipped
    layer = klb.LearnedBitDense(3, bits=2, use_bias=False, kernel_initializer=normal)
    x = np.random.default_rng(0).normal(size=(20, 30)).astype("float32")
    layer(x)
    kernel = layer.quantized_kernels["kernel"]
    with tf.GradientTape() as tape:
        tape.watch(kernel.bits.value)
        loss = tf.reduce_mean(tf.square(layer(x)))
    gradient = tape.gradient(loss, kernel.bits.value)

    w, scale = kernel.kernel.numpy().astype("float64"), np.exp(kernel.log_scale.numpy())
    logs = np.log(grids.GAUSSIAN_STEPS)

    def step_at(bits):
        return scale * np.exp(logs[1] + (bits - 2) * (logs[2] - logs[0]) / 2)

    residual = (kernel.quantized().numpy() - w) / step_at(2)
    outside = np.abs(w) > 2 * step_at(2)
    assert outside.any()

    def loss_at(bits):
        clipped = np.sign(w) * step_at(bits) * (2**bits - 1) / 2
        quantized = np.where(outside, clipped, w + step_at(bits) * residual)
        return ((x @ quantized) ** 2).mean()

    np.testing.assert_allclose(gradient, (loss_at(2.001) - loss_at(1.999)) / 0.002, rtol=1e-3)


def test_without_a_task_gradient_the_price_takes_the_bits_down(make_model, data):
    x, y = data
    zero = np.zeros_like(x), np.zeros_like(y)
    moves = step_of_bits(make_model(bits=4), zero, bit_reg=1.0, quantization_reg=0.0)
    assert moves == [-1, -1]


def test_without_a_price_the_quantization_error_takes_the_bits_up(make_model, data):
    x, y = data
    zero = np.zeros_like(x), np.zeros_like(y)
    model = make_model(bits=4)
    quantized_kernels(model)[1].bits.assign(5.0)
    assert step_of_bits(model, zero, bit_reg=0.0, quantization_reg=1.0) == [1, 1]


def test_an_unknown_bit_gradient_is_refused(make_model):
    with pytest.raises(ValueError, match="`bit_gradient` must be one of .*'straight_through'"):
        make_model().compile("adam", "mse", bit_gradient="typo")
