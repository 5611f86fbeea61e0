import numpy as np
import pytest
import tensorflow as tf
from thorough import thorough

import keras_learnbits as klb
from keras_learnbits.numerics import grids, rounding


def grid_of(step, bits):
    max_code = 2**bits - 1
    return grids.Grid(*(tf.constant(v, tf.float32) for v in (step, -max_code / 2, max_code)))


def nearest_level(kernel, step, bits):
    """Brute force: the nearest of all levels."""
    levels = step * (np.arange(2**bits) - (2**bits - 1) / 2)
    return levels[np.argmin(np.abs(kernel[..., None] - levels), axis=-1)]


@pytest.mark.parametrize("bits", range(1, 9))
def test_each_weight_goes_to_its_nearest_level(bits):
    kernel = np.random.default_rng(bits).normal(size=500).astype("float32")
    quantized = rounding.fake_quantize(tf.constant(kernel), grid_of(0.3, bits))
    np.testing.assert_allclose(quantized, nearest_level(kernel, 0.3, bits), rtol=1e-6)


@pytest.mark.parametrize("bits", range(1, 17))
def test_there_are_at_most_2_to_the_bits_levels(bits):
    kernel = tf.random.normal([200_000])
    grid = grid_of(grids.GAUSSIAN_STEPS[bits - 1], bits)
    quantized, codes = rounding.fake_quantize(kernel, grid), grids.encode(kernel, grid)
    assert len(np.unique(quantized)) <= 2**bits
    assert codes.numpy().min() >= 0
    assert codes.numpy().max() <= 2**bits - 1


@pytest.mark.parametrize("bits", [1, 2, 3, 8, 12])
def test_weights_on_the_grid_stay_where_they_are(bits):
    grid = grid_of(0.37, bits)
    levels = grids.decode(tf.range(2.0**bits), grid)
    np.testing.assert_array_equal(rounding.fake_quantize(levels, grid), levels)


def test_gradients_of_fake_quantize_match_their_closed_forms():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(50, 3)).astype("float32")
    upstream = rng.normal(size=kernel.shape).astype("float32")
    step = np.array([[0.2, 0.5, 1.0]], "float32")
    offset, max_code = np.float32(-1.5), np.float32(3)
    tensors = [tf.constant(v) for v in (kernel, step, offset, max_code)]
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        quantized = rounding.fake_quantize(tensors[0], grids.Grid(*tensors[1:]))
        loss = tf.reduce_sum(quantized * upstream)
    to_kernel, to_step, to_offset, to_max_code = tape.gradient(loss, tensors)

    position = kernel / step - offset
    below, above = position < -0.5, position >= 3.5
    inside = ~below & ~above
    q = quantized.numpy()
    assert inside.any()
    assert below.any()
    assert above.any()
    np.testing.assert_allclose(to_kernel, upstream * inside)
    slope = np.where(inside, q - kernel, q) / step
    np.testing.assert_allclose(to_step, (upstream * slope).sum(0, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(to_offset, (upstream * step * ~inside).sum(), rtol=1e-5)
    np.testing.assert_allclose(to_max_code, (upstream * step * above).sum(), rtol=1e-5)


def test_gradient_of_squared_error_is_the_true_derivative():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=40).astype("float32")
    inputs, grid = [tf.constant(kernel), tf.constant(0.4)], grid_of(0.4, 2)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        stepped = grid._replace(step=inputs[1])
        _, error, _ = rounding.quantize_with_error(inputs[0], stepped, by_bits=grid)
    to_kernel, to_step = tape.gradient(error, inputs)
    kernel = kernel.astype("float64")
    q = nearest_level(kernel, 0.4, 2)
    np.testing.assert_allclose(error, ((q - kernel) ** 2).sum(), rtol=1e-5)
    np.testing.assert_allclose(to_kernel, 2 * (kernel - q), atol=1e-6)

    def error_at(step):  # codes may change
        return ((nearest_level(kernel, step, 2) - kernel) ** 2).sum()

    slope = (error_at(0.4 + 1e-6) - error_at(0.4 - 1e-6)) / 2e-6
    np.testing.assert_allclose(to_step, slope, rtol=1e-3)


# Shapes of a kernel, and of its scales: dense, convolution, per tensor, transposed, attention,
# and one whose rows cannot be divided into equal parts.
SHAPES = [
    ((50, 7), (1, 7)),
    ((3, 3, 4, 5), (1, 1, 1, 5)),
    *thorough(
        ((50, 7), (1, 1)),
        ((50, 7), ()),
        ((3, 2, 4, 5), (1, 1, 4, 1)),
        ((6, 2, 5), (1, 2, 5)),
        ((2, 3, 5), (2, 1, 1)),
        ((13, 5), (1, 5)),
        ((64, 5), (1, 5)),
    ),
]


@pytest.mark.parametrize("bits", [2, *thorough(1, 5)])
@pytest.mark.parametrize("size", [0, 2**62], ids=["compiled", "not compiled"])
@pytest.mark.parametrize(("shape", "scales"), SHAPES)
def test_levels_and_error_are_those_of_plain_tensorflow(shape, scales, size, bits, monkeypatch):
    monkeypatch.setattr(rounding, "COMPILED_SIZE", size)
    rng = np.random.default_rng(bits)
    step = tf.constant(rng.uniform(0.2, 0.6, scales), tf.float32)
    grid = grid_of(1.0, bits)._replace(step=step)
    by_bits = grids.Grid(*map(tf.identity, grid))
    kernel = tf.constant(rng.normal(size=shape), tf.float32)
    upstream = rng.normal(size=shape).astype("float32")

    def gradients(together):
        with tf.GradientTape() as tape:
            tape.watch([kernel, step, *by_bits])
            if together:
                quantized, error, norm = rounding.quantize_with_error(kernel, grid, by_bits)
                assert float(norm) == pytest.approx(np.square(kernel).sum(), rel=1e-5)
            else:
                # The step with gradients for the scales, and for the bits.
                both = by_bits._replace(step=step + by_bits.step - tf.stop_gradient(step))
                quantized = rounding.fake_quantize(kernel, both)
                codes = tf.stop_gradient(grids.encode(kernel, grid))
                error = tf.reduce_sum(tf.square(grids.decode(codes, grid) - kernel))
            total = tf.reduce_sum(upstream * quantized) + 0.3 * error
        return quantized, error, tape.gradient(total, [kernel, step, *by_bits])

    (quantized, error, found), (expected, expected_error, others) = map(gradients, (True, False))
    np.testing.assert_array_equal(quantized, expected)
    assert float(error) == pytest.approx(float(expected_error), rel=1e-5)
    assert float(rounding.squared_error(kernel, grid)) == float(error)
    for one, other in zip(found, others, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [2**62, *thorough(0)], ids=["not compiled", "compiled"])
def test_bfloat16_levels_and_gradients_are_those_of_float32_rounded(size, monkeypatch):
    monkeypatch.setattr(rounding, "COMPILED_SIZE", size)
    rng = np.random.default_rng(0)
    kernel = tf.constant(rng.normal(size=(48, 7)), tf.float32)
    upstream = tf.cast(rng.normal(size=(48, 7)), tf.bfloat16)
    grid = grid_of(0.4, 3)

    def found(dtype):
        with tf.GradientTape() as tape:
            tape.watch([kernel, grid.step])
            quantized, _, _ = rounding.quantize_with_error(kernel, grid, dtype=dtype)
            total = tf.reduce_sum(quantized * tf.cast(upstream, dtype))
        return quantized, tape.gradient(total, [kernel, grid.step])

    (levels, gradients), (expected, others) = found("bfloat16"), found("float32")
    assert levels.dtype == tf.bfloat16
    np.testing.assert_array_equal(levels, tf.cast(expected, tf.bfloat16))
    for one, other in zip(gradients, others, strict=True):
        assert one.dtype == tf.float32
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_compiled_loops_round_weights_at_the_border_of_two_levels_alike(monkeypatch):
    """Fused multiply-adds would change some codes, so that files would differ from training."""
    monkeypatch.setattr(rounding, "COMPILED_SIZE", 0)
    rng = np.random.default_rng(0)
    step = tf.constant(rng.uniform(0.01, 1, (1, 256)), tf.float32)
    grid = grid_of(1.0, 3)._replace(step=step)
    borders = (step * rng.integers(-4, 5, (512, 256))).numpy().astype("float32")
    kernel = tf.constant(np.nextafter(borders, rng.choice([-9, 9], borders.shape).astype("f")))
    quantized, _, _ = rounding.quantize_with_error(kernel, grid, by_bits=grid)
    np.testing.assert_array_equal(quantized, grids.decode(grids.encode(kernel, grid), grid))


@pytest.mark.parametrize("size", [2**62, *thorough(0)], ids=["not compiled", "compiled"])
def test_rows_of_an_embedding_that_were_not_read_get_no_gradient(size, monkeypatch):
    monkeypatch.setattr(rounding, "COMPILED_SIZE", size)
    kernel = tf.random.stateless_uniform((20, 3), (0, 1), -0.4, 0.4)
    with tf.GradientTape() as tape:
        tape.watch(kernel)
        quantized, _, _ = rounding.quantize_with_error(kernel, grid_of(0.5, 2))
        total = tf.reduce_sum(tf.gather(quantized, [3, 5, 5]))
    expected = np.zeros((20, 3))
    expected[3], expected[5] = 1, 2
    np.testing.assert_array_equal(tape.gradient(total, kernel), expected)


class AffineQuantizer(klb.quantizers.Quantizer):
    """A user's quantizer: its step follows the largest weight, its zero point the trained scale."""

    def grid(self, kernel, bits, log_scale=None):
        max_code = grids.max_code(bits)
        return grids.Grid(2 * tf.reduce_max(tf.abs(kernel)) / max_code, -1.5 * log_scale, max_code)

    def log_step_slope(self, bits):
        return -np.log(2.0)


@pytest.mark.parametrize("by_bits", [True, False])
@pytest.mark.parametrize("name", ["learned_scale", "min_max", "affine"])
def test_with_its_error_a_kernel_has_the_gradients_that_it_has_without(name, by_bits):
    quantizer = AffineQuantizer() if name == "affine" else klb.quantizers.get(name)
    kernel = tf.random.stateless_normal((30, 4), (0, 1))
    upstream = tf.random.stateless_normal((30, 4), (0, 2))
    bits, log_scale = tf.constant(2.0), tf.constant(0.7)
    inputs = [kernel, log_scale, bits]

    def gradients(with_error):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            if with_error:
                quantized, _, _ = quantizer.quantize_with_error(
                    kernel, bits, log_scale, by_bits=by_bits
                )
            else:
                quantized = quantizer.quantize(kernel, bits, log_scale)
            total = tf.reduce_sum(upstream * quantized)
        return tape.gradient(total, inputs[: 2 + by_bits], unconnected_gradients="zero")

    for one, other in zip(gradients(True), gradients(False), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
