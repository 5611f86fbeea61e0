import keras
import numpy as np
import pytest
import tensorflow as tf
from thorough import thorough

from keras_learnbits import quantizers
from keras_learnbits.numerics import grids
from keras_learnbits.quantizers import LearnedScaleQuantizer, MinMaxQuantizer

RNG = np.random.default_rng(3)
KERNELS = {
    "random": RNG.normal(size=(40, 6)),
    "constant": np.full((5, 3), 0.7),
    "negative constant": np.full((5, 3), -0.7),
    "zeros": np.zeros((5, 3)),
    "one weight": np.array([[-0.3]]),
    "huge": RNG.normal(size=(9, 2)) * 1e30,
    "tiny": RNG.normal(size=(9, 2)) * 1e-30,
    "all positive": RNG.uniform(5, 6, size=(9, 2)),
    "a channel of zeros": np.stack([np.zeros(9), np.ones(9)], axis=1),
    "float16": RNG.normal(size=(9, 2)).astype("float16"),
    "bfloat16": RNG.normal(size=(9, 2)).astype(tf.bfloat16.as_numpy_dtype),
}


def state_of(quantizer, kernel):
    shape = quantizer.scale_shape(kernel.shape, (-1,))
    return None if shape is None else quantizer.initial_log_scale(kernel, shape)


@pytest.mark.parametrize("bits", [1, 3, 16, *thorough(2, 8)])
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("quantizer", [LearnedScaleQuantizer(), MinMaxQuantizer()], ids=repr)
def test_codes_decode_to_the_levels_of_training(quantizer, name, bits):
    values = KERNELS[name]
    kernel = tf.constant(values if values.dtype != "float64" else values.astype("float32"))
    log_scale = state_of(quantizer, kernel)
    kernel = tf.cast(kernel, tf.float32)
    bits = tf.constant(float(bits))
    levels = quantizer.quantize(kernel, bits, log_scale).numpy()
    codes, grid = quantizer.encode(kernel, bits, log_scale)
    assert codes.dtype == tf.int32
    assert codes.numpy().min() >= 0
    assert codes.numpy().max() <= 2 ** int(bits) - 1
    decoded = grid.step.numpy() * (codes.numpy().astype("float32") + grid.offset.numpy())
    np.testing.assert_array_equal(levels, decoded)
    assert np.isfinite(levels).all()


class ShiftedGrid:
    def grid(self, kernel, bits, log_scale=None):
        step, offset, max_code = super().grid(kernel, bits, log_scale)
        return grids.Grid(step, offset - 0.5, max_code)


class Shifted(ShiftedGrid, LearnedScaleQuantizer):
    """A user's quantizer, whose grid comes from a class that is not a quantizer."""


def test_a_subclass_with_a_custom_grid_stores_what_it_trains():
    kernel, bits, log_scale = tf.constant([[0.3], [-0.7]]), tf.constant(2.0), tf.zeros((1, 1))
    levels = Shifted().quantize(kernel, bits, log_scale)
    codes, grid = Shifted().encode(kernel, bits, log_scale)
    np.testing.assert_array_equal(grids.decode(tf.cast(codes, tf.float32), grid), levels)
    np.testing.assert_array_equal(
        Shifted().quantize_with_error(kernel, bits, log_scale, by_bits=False)[0], levels
    )
    assert not np.array_equal(levels, LearnedScaleQuantizer().quantize(kernel, bits, log_scale))


@pytest.mark.parametrize("bits", range(1, 9))
def test_min_max_matches_numpy(bits):
    kernel = KERNELS["random"].astype("float32")
    low, high = kernel.min().astype("float64"), kernel.max().astype("float64")
    step = (high - low) / (2**bits - 1)
    expected = low + step * np.round((kernel - low) / step)
    actual = MinMaxQuantizer().quantize(tf.constant(kernel), tf.constant(float(bits)))
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("bits", range(1, 9))
def test_learned_scale_matches_numpy(bits):
    kernel = KERNELS["random"].astype("float32")
    scale = np.sqrt((kernel.astype("float64") ** 2).mean(0))
    step = grids.GAUSSIAN_STEPS[bits - 1] * scale
    levels = step * (np.arange(2**bits)[:, None, None] - (2**bits - 1) / 2)
    nearest = np.argmin(np.abs(kernel - levels), axis=0)
    expected = np.take_along_axis(
        np.broadcast_to(levels, (2**bits, *kernel.shape)), nearest[None], 0
    )
    quantizer = LearnedScaleQuantizer()
    log_scale = state_of(quantizer, tf.constant(kernel))
    actual = quantizer.quantize(tf.constant(kernel), tf.constant(float(bits)), log_scale)
    np.testing.assert_allclose(actual, expected[0], rtol=1e-4)


def test_one_more_bit_divides_the_error_by_about_four():
    kernel, quantizer = tf.random.normal((5000, 2)), LearnedScaleQuantizer()
    log_scale = state_of(quantizer, kernel)
    errors = [
        float(quantizer.quantize_with_error(kernel, tf.constant(bits), log_scale)[1])
        for bits in (5.0, 6.0)
    ]
    assert 3 < errors[0] / errors[1] < 4.5


@pytest.mark.parametrize("bits", [1, *thorough(2, 8)])
def test_a_channel_of_zeros_is_rounded_to_almost_zero(bits):
    """As pruned channels are; without this they would be rounded to half a step of the others."""
    kernel = tf.constant(np.stack([RNG.normal(size=50), np.zeros(50)], axis=1), tf.float32)
    quantizer, bits = LearnedScaleQuantizer(), tf.constant(float(bits))
    log_scale = quantizer.fitted_log_scale(kernel, bits, (1, 2))
    quantized = np.abs(quantizer.quantize(kernel, bits, log_scale))
    assert quantized[:, 1].max() < 0.01 * quantized[:, 0].mean()
    alone = quantizer.fitted_log_scale(kernel[:, :1], bits, (1, 1))
    np.testing.assert_allclose(log_scale[0, 0], alone[0, 0], atol=0.05)


def test_a_kernel_of_zeros_gets_scales_that_can_grow():
    log_scale = LearnedScaleQuantizer().initial_log_scale(tf.zeros((16, 2)), (1, 2))
    np.testing.assert_allclose(np.exp(log_scale), [[0.25, 0.25]])


def test_a_scale_serves_a_channel_or_the_whole_kernel():
    assert LearnedScaleQuantizer().scale_shape((3, 3, 4, 5), (-1,)) == (1, 1, 1, 5)
    assert LearnedScaleQuantizer().scale_shape((3, 3, 4, 5), (-2, -1)) == (1, 1, 4, 5)
    assert LearnedScaleQuantizer(per_channel=False).scale_shape((3, 4), (-1,)) == (1, 1)
    assert MinMaxQuantizer().scale_shape((3, 4), (-1,)) is None


@pytest.mark.parametrize("quantizer", [LearnedScaleQuantizer(False), MinMaxQuantizer()], ids=repr)
def test_the_error_falls_with_the_bits_by_the_linearized_slope(quantizer):
    kernel = tf.random.normal((30, 4))
    bits = tf.constant(4.0)
    with tf.GradientTape() as tape:
        tape.watch(bits)
        _, error, _ = quantizer.quantize_with_error(kernel, bits, state_of(quantizer, kernel))
    slope = tape.gradient(error, bits)
    np.testing.assert_allclose(slope, 2 * error * quantizer.log_step_slope(bits), rtol=1e-6)
    assert slope < 0


@pytest.mark.parametrize("quantizer", [LearnedScaleQuantizer(False), MinMaxQuantizer()], ids=repr)
def test_a_quantizer_survives_its_config(quantizer):
    assert quantizers.get(quantizers.serialize(quantizer)) == quantizer
    assert keras.saving.deserialize_keras_object(quantizers.serialize(quantizer)) == quantizer


def test_an_unknown_quantizer_is_refused():
    with pytest.raises(ValueError, match="`kernel_quantizer` must be one of .*'min_max'.*'typo'"):
        quantizers.get("typo")
