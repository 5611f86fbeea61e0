import numpy as np
import pytest
import tensorflow as tf

from keras_learnbits.numerics import grids


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

    step = grids.GAUSSIAN_STEPS[bits - 1]
    assert error(step) < error(step * 1.03)
    assert error(step) < error(step / 1.03)


@pytest.mark.parametrize(("bits", "integer"), [(1.0, 1), (1.49, 1), (1.5, 2), (2.5, 3), (7.6, 8)])
def test_bits_round_to_the_nearest_integer_and_halves_go_up(bits, integer):
    assert grids.integer_bits(tf.constant(bits)) == integer
    assert grids.max_code(tf.constant(bits)) == 2**integer - 1
    step = grids.GAUSSIAN_STEPS[integer - 1]
    found, highest = grids.gaussian_grid(tf.constant(bits))
    assert found.numpy() == np.float32(step)
    assert highest == 2**integer - 1


def test_slopes_in_the_bits_are_those_of_real_bit_widths():
    bits = tf.Variable(3.2)
    with tf.GradientTape(persistent=True) as tape:
        code = grids.max_code(bits)
        step, highest = grids.gaussian_grid(bits)
    np.testing.assert_allclose(tape.gradient(code, bits), 8 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(tape.gradient(highest, bits), 8 * np.log(2), rtol=1e-6)
    steps = grids.GAUSSIAN_STEPS
    slope = steps[2] * np.log(steps[3] / steps[1]) / 2
    np.testing.assert_allclose(tape.gradient(step, bits), slope, rtol=1e-5)
