import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_learnbits as klb
from keras_learnbits import ops
from keras_learnbits.bit_gradients import Paper
from keras_learnbits.layers.tensors import quantized_kernels


@pytest.fixture
def paper_layer():
    layer = klb.LearnedBitDense(4, bits=3, kernel_quantizer="min_max")
    layer.build((None, 30))
    return layer


def test_the_papers_slope_is_the_printed_formula(paper_layer):
    kernel = paper_layer.quantized_kernels["kernel"]
    w = kernel.kernel.numpy().astype("float64")
    step = (w.max() - w.min()) / 7
    codes = np.round((w - w.min()) / step)
    expected = ((w.min() + step * codes - w) * -np.log(2) * step * codes).sum()
    np.testing.assert_allclose(Paper.error_slope(kernel), expected, rtol=1e-4)


def test_the_papers_slope_is_zero_for_weights_on_their_grid(paper_layer):
    kernel = paper_layer.quantized_kernels["kernel"]
    kernel.project()
    np.testing.assert_allclose(Paper.error_slope(kernel), 0, atol=1e-6)


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
    normal = keras.initializers.RandomNormal(stddev=0.5, seed=0)  # with tails to be clipped
    layer = klb.LearnedBitDense(3, bits=2, use_bias=False, kernel_initializer=normal)
    x = np.random.default_rng(0).normal(size=(20, 30)).astype("float32")
    layer(x)
    kernel = layer.quantized_kernels["kernel"]
    with tf.GradientTape() as tape:
        tape.watch(kernel.bits.value)
        loss = tf.reduce_mean(tf.square(layer(x)))
    gradient = tape.gradient(loss, kernel.bits.value)

    w, scale = kernel.kernel.numpy().astype("float64"), np.exp(kernel.log_scale.numpy())
    logs = np.log(ops.GAUSSIAN_STEPS)

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


def test_in_paper_mode_bits_do_not_see_the_task(make_model, data):
    x, y = data
    settings = {"bit_gradient": "paper", "bit_penalty": "levels", "quantization_error": "squared"}
    steps = []
    for factor in (1.0, -1e6):
        keras.utils.set_random_seed(1)
        model = make_model(bits=4, kernel_quantizer="min_max")
        steps.append(
            step_of_bits(model, (x, y * factor), bit_reg=1e-4, quantization_reg=1.0, **settings)
        )
        slopes = [
            Paper.error_slope(k) + 1e-4 * np.log(2) * 2.0**4 for k in quantized_kernels(model)[:1]
        ]
    assert steps[0] == steps[1]
    assert steps[0][0] == -np.sign(slopes[0])


def test_in_paper_mode_an_update_starts_on_the_grid(make_model, data):
    model = make_model(bits=2, max_bits=2, kernel_quantizer="min_max")
    model.compile(keras.optimizers.SGD(0.0), "mse", bit_gradient="paper")
    kernel = quantized_kernels(model)[0]
    projected = kernel.quantized().numpy()
    assert np.abs(kernel.kernel.numpy() - projected).max() > 0
    model.fit(*data, batch_size=64, verbose=0)
    np.testing.assert_array_equal(kernel.kernel, projected)


def test_paper_mode_learns_the_same_on_two_replicas(strategy, make_model, data):
    def train():
        model = make_model(bits=4, kernel_quantizer="min_max")
        model.compile(
            keras.optimizers.SGD(0.1), "mse", bit_gradient="paper", bit_optimizer=klb.SignSGD(0.25)
        )
        model.fit(*data, batch_size=16, shuffle=False, verbose=0)
        return [tf.convert_to_tensor(v.value).numpy() for v in model.trainable_variables]

    one = train()
    keras.utils.set_random_seed(1)
    with strategy.scope():
        two = train()
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_an_unknown_bit_gradient_is_refused(make_model):
    with pytest.raises(ValueError, match="`bit_gradient` must be one of .*'straight_through'"):
        make_model().compile("adam", "mse", bit_gradient="typo")
