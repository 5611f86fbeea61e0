import numpy as np
import pytest
import tensorflow as tf

from keras_learnbits import ops


def grid_of(step, bits):
    max_code = 2**bits - 1
    return ops.Grid(*(tf.constant(v, tf.float32) for v in (step, -max_code / 2, max_code)))


def nearest_level(kernel, step, bits):
    """Brute force: the nearest of all levels."""
    levels = step * (np.arange(2**bits) - (2**bits - 1) / 2)
    return levels[np.argmin(np.abs(kernel[..., None] - levels), axis=-1)]


@pytest.mark.parametrize("bits", range(1, 9))
def test_each_weight_goes_to_its_nearest_level(bits):
    kernel = np.random.default_rng(bits).normal(size=500).astype("float32")
    quantized = ops.fake_quantize(tf.constant(kernel), grid_of(0.3, bits))
    np.testing.assert_allclose(quantized, nearest_level(kernel, 0.3, bits), rtol=1e-6)


@pytest.mark.parametrize("bits", range(1, 17))
def test_there_are_at_most_2_to_the_bits_levels(bits):
    kernel = tf.random.normal([200_000])
    grid = grid_of(ops.GAUSSIAN_STEPS[bits - 1], bits)
    quantized, codes = ops.fake_quantize(kernel, grid), ops.encode(kernel, grid)
    assert len(np.unique(quantized)) <= 2**bits
    assert codes.numpy().min() >= 0
    assert codes.numpy().max() <= 2**bits - 1


@pytest.mark.parametrize("bits", [1, 2, 3, 8, 12])
def test_weights_on_the_grid_stay_where_they_are(bits):
    grid = grid_of(0.37, bits)
    levels = ops.decode(tf.range(2.0**bits), grid)
    np.testing.assert_array_equal(ops.fake_quantize(levels, grid), levels)


def test_gradients_of_fake_quantize_match_their_closed_forms():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(50, 3)).astype("float32")
    upstream = rng.normal(size=kernel.shape).astype("float32")
    step = np.array([[0.2, 0.5, 1.0]], "float32")
    offset, max_code = np.float32(-1.5), np.float32(3)
    tensors = [tf.constant(v) for v in (kernel, step, offset, max_code)]
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        quantized = ops.fake_quantize(tensors[0], ops.Grid(*tensors[1:]))
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
    inputs = [tf.constant(kernel), tf.constant(0.4)]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        _, error, _ = ops.quantize_with_error(inputs[0], grid_of(0.4, 2), inputs[1])
    to_kernel, to_step = tape.gradient(error, inputs)
    kernel = kernel.astype("float64")
    q = nearest_level(kernel, 0.4, 2)
    np.testing.assert_allclose(error, ((q - kernel) ** 2).sum(), rtol=1e-5)
    np.testing.assert_allclose(to_kernel, 2 * (kernel - q), atol=1e-6)

    def error_at(step):  # codes free to change
        return ((nearest_level(kernel, step, 2) - kernel) ** 2).sum()

    slope = (error_at(0.4 + 1e-6) - error_at(0.4 - 1e-6)) / 2e-6
    np.testing.assert_allclose(to_step, slope, rtol=1e-3)


@pytest.mark.parametrize("bits", range(1, 17))
def test_gaussian_steps_have_the_least_error_on_gaussian_weights(bits):
    # Quantiles of the normal distribution by inverting its integral on a fine grid.
    points = np.linspace(-7, 7, 400_001)
    density = np.exp(-(points**2) / 2)
    density /= density.sum()

    def error(step):
        half = 2 ** (bits - 1)
        codes = np.clip(np.floor(points / step), -half, half - 1)
        return ((points - (codes + 0.5) * step) ** 2 * density).sum()

    step = ops.GAUSSIAN_STEPS[bits - 1]
    assert error(step) < error(step * 1.03)
    assert error(step) < error(step / 1.03)


@pytest.mark.parametrize(("bits", "integer"), [(1.0, 1), (1.49, 1), (1.5, 2), (2.5, 3), (7.6, 8)])
def test_bits_round_to_the_nearest_integer_and_halves_go_up(bits, integer):
    assert ops.integer_bits(tf.constant(bits)) == integer
    assert ops.max_code(tf.constant(bits)) == 2**integer - 1
    step = ops.GAUSSIAN_STEPS[integer - 1]
    assert ops.gaussian_step(tf.constant(bits)).numpy() == np.float32(step)


def test_slopes_in_the_bits_are_those_of_real_bit_widths():
    bits = tf.Variable(3.2)
    with tf.GradientTape(persistent=True) as tape:
        code, step = ops.max_code(bits), ops.gaussian_step(bits)
    np.testing.assert_allclose(tape.gradient(code, bits), 8 * np.log(2), rtol=1e-6)
    steps = ops.GAUSSIAN_STEPS
    slope = steps[2] * np.log(steps[3] / steps[1]) / 2
    np.testing.assert_allclose(tape.gradient(step, bits), slope, rtol=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 5])
@pytest.mark.parametrize("size", [0, 2**62], ids=["compiled", "not compiled"])
def test_one_pass_gives_what_rounding_and_its_error_give_by_themselves(bits, size, monkeypatch):
    monkeypatch.setattr(ops, "COMPILED_SIZE", size)
    rng = np.random.default_rng(bits)
    step = tf.constant(rng.uniform(0.2, 0.6, (1, 7)), tf.float32)
    grid = grid_of(1.0, bits)._replace(step=step)
    upstream = rng.normal(size=(50, 7)).astype("float32")
    kernel = tf.constant(rng.normal(size=(50, 7)), tf.float32)

    def gradients(together):
        error_step = tf.identity(step)
        with tf.GradientTape() as tape:
            tape.watch([kernel, *grid, error_step])
            if together:
                quantized, error, energy = ops.quantize_with_error(kernel, grid, error_step)
                assert float(energy) == pytest.approx(np.square(kernel).sum(), rel=1e-5)
            else:
                quantized = ops.fake_quantize(kernel, grid)
                offset = tf.stop_gradient(grid.offset)
                codes = tf.stop_gradient(ops.encode(kernel, grid))
                levels = ops.decode(codes, grid._replace(step=error_step, offset=offset))
                error = tf.reduce_sum(tf.square(levels - kernel))
            total = tf.reduce_sum(upstream * quantized) + 0.3 * error
        return quantized, error, tape.gradient(total, [kernel, *grid, error_step])

    (quantized, error, found), (expected, expected_error, others) = map(gradients, (True, False))
    np.testing.assert_array_equal(quantized, expected)
    assert float(error) == pytest.approx(float(expected_error), rel=1e-5)
    for one, other in zip(found, others, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_compiled_functions_round_weights_at_the_border_of_two_levels_alike(monkeypatch):
    """Fused multiplications and additions would move some, and files differ from training."""
    monkeypatch.setattr(ops, "COMPILED_SIZE", 0)
    rng = np.random.default_rng(0)
    step = tf.constant(rng.uniform(0.01, 1, (1, 256)), tf.float32)
    grid = grid_of(1.0, 3)._replace(step=step)
    borders = (step * rng.integers(-4, 5, (512, 256))).numpy().astype("float32")
    kernel = tf.constant(np.nextafter(borders, rng.choice([-9, 9], borders.shape).astype("f")))
    quantized, _, _ = ops.quantize_with_error(kernel, grid, step)
    np.testing.assert_array_equal(quantized, ops.decode(ops.encode(kernel, grid), grid))
