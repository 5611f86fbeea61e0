"""Pure tensor functions: grids, rounding to a grid, and what rounding costs.

A *grid* is what a kernel is rounded to: the `max_code + 1` evenly spaced levels

    level(code) = step * (code + offset),    code = 0, 1, ..., max_code

Everything is computed in float32; shapes of `step`, `offset` and `max_code` broadcast
against the kernel's, with 1 (or no axis at all) where they are shared.
"""

import math
from typing import NamedTuple

import tensorflow as tf

MIN_BITS = 1
MAX_BITS = 16
# Divisor in place of the squared norm of a kernel of zeros.
TINY = 1e-30

# Step of the symmetric mid-rise grid of 2**bits levels with the least squared error on unit
# Gaussian weights, for 1, 2, ..., 16 bits (found by minimizing the error in closed form).
GAUSSIAN_STEPS = (
    1.595769, 0.9956867, 0.5860194, 0.3352006, 0.1881388, 0.1040631, 0.05686777, 0.03076240,
    0.01649896, 0.008785460, 0.004649840, 0.002448416, 0.001283620, 6.704597e-4, 3.490671e-4,
    1.812283e-4,
)  # fmt: skip


class Grid(NamedTuple):
    """Evenly spaced levels `step * (code + offset)` for `code` in `0..max_code`.

    Attributes:
        step: Distance between two levels; positive.
        offset: Code-valued shift of the levels; a half-integer on mid-rise grids.
        max_code: The highest code, `2**bits - 1`.
    """

    step: tf.Tensor
    offset: tf.Tensor
    max_code: tf.Tensor


def integer_bits(bits):
    """Rounds a real bit-width to the integer in use; halves go up.

    Examples:
        >>> integer_bits(tf.constant([2.4, 2.5, 3.5])).numpy().tolist()
        [2.0, 3.0, 4.0]
    """
    return tf.floor(bits + 0.5)


def max_code(bits):
    """The highest code, `2**B - 1` at the integer `B` nearest to `bits`.

    Differentiable in `bits` as if they were real: the derivative is `ln(2) * 2**B`.

    Examples:
        >>> max_code(tf.constant(2.7)).numpy().item()
        7.0
    """
    levels = 2.0 ** integer_bits(bits)
    at_is_zero = bits - tf.stop_gradient(bits)
    return tf.stop_gradient(levels) - 1.0 + math.log(2.0) * tf.stop_gradient(levels) * at_is_zero


def gaussian_grid(bits):
    """Best step for unit Gaussian weights of a `2**B`-level mid-rise grid, and its highest code.

    `B` is the integer nearest to `bits`. Derivatives in `bits` are those of real bit-widths: of
    the step, of the table interpolated in the logarithm, `step * gaussian_log_step_slope(bits)`;
    of the code, as of `max_code`.

    Examples:
        >>> step, highest = gaussian_grid(tf.constant(1.0))
        >>> round(float(step), 4), float(highest)
        (1.5958, 1.0)
    """
    step, step_slope, highest, highest_slope = _gaussian_row(bits)
    at_is_zero = bits - tf.stop_gradient(bits)
    return step + step_slope * at_is_zero, highest + highest_slope * at_is_zero


def constant_gaussian_grid(bits):
    """`gaussian_grid` without derivatives, in half as many operations.

    Examples:
        >>> step, highest = constant_gaussian_grid(tf.constant(2.0))
        >>> round(float(step), 4), float(highest)
        (0.9957, 3.0)
    """
    step, _, highest, _ = _gaussian_row(bits)
    return step, highest


def gaussian_log_step_slope(bits):
    """Derivative of the logarithm of the best step by the bits: -0.47 at 1 bit, -0.65 at 16.

    Examples:
        >>> round(float(gaussian_log_step_slope(tf.constant(4.0))), 3)
        -0.568
    """
    return tf.gather(tf.constant(_LOG_STEP_SLOPES, tf.float32), _table_index(bits))


def _gaussian_row(bits):
    row = tf.gather(tf.constant(_GAUSSIAN_GRIDS, tf.float32), _table_index(bits))
    return tf.unstack(row, num=4)


def _table_index(bits):
    return tf.cast(bits + 0.5, tf.int32)  # towards 0, which is down


def _log_step_slopes():
    logs = [math.log(step) for step in GAUSSIAN_STEPS]
    extended = [2 * logs[0] - logs[1], *logs, 2 * logs[-1] - logs[-2]]
    return [(after - before) / 2 for before, after in zip(extended, extended[2:], strict=False)]


# Rows are numbered by bits. Row 0 is that of 1 bit: nobody reads it, and it is finite, for those
# who debug with `tf.debugging.enable_check_numerics`.
_LOG_STEP_SLOPES = [*_log_step_slopes()[:1], *_log_step_slopes()]
_GAUSSIAN_GRIDS = [
    (step, step * slope, 2**bits - 1, math.log(2.0) * 2**bits)
    for bits, (step, slope) in enumerate(
        zip((GAUSSIAN_STEPS[0], *GAUSSIAN_STEPS), _LOG_STEP_SLOPES, strict=True)
    )
]


def encode(kernel, grid):
    """Codes of the levels nearest to the kernel's weights.

    Args:
        kernel: Float tensor.
        grid: `Grid`.

    Returns:
        Float32 tensor of the kernel's shape with integers in `0..max_code`.
    """
    codes, _ = nearest_codes(tf.cast(kernel, tf.float32), grid)
    return codes


def nearest_codes(kernel, grid):
    """`encode`, and by how many codes weights lie beyond the range: below it less than 0.

    Examples:
        >>> grid = Grid(tf.constant(1.0), tf.constant(-1.5), tf.constant(3.0))
        >>> codes, beyond = nearest_codes(tf.constant([-3.0, 0.4]), grid)
        >>> codes.numpy().tolist(), beyond.numpy().tolist()
        ([0.0, 2.0], [-1.0, 0.0])
    """
    # Not times a reciprocal: compilers would fuse it with the sum, and round otherwise.
    position = kernel / grid.step - grid.offset
    nearest = tf.floor(position + 0.5)
    codes = tf.clip_by_value(nearest, 0.0, grid.max_code)
    return codes, nearest - codes


def decode(codes, grid):
    """Levels that belong to codes: `step * (code + offset)`, float32."""
    return grid.step * (codes + grid.offset)


def with_error_slope(error, bits, log_step_slope):
    """`error` with the derivative in `bits` that a squared error has while no weight is clipped.

    There it grows as the square of the step, so `d error / d bits = 2 * error * log_step_slope`:
    -1.39 times the error where one bit more halves the step. This is the linearization of the
    published method; the exact difference to one bit more is -0.75 times the error, to one
    fewer +3 times.

    Examples:
        >>> bits = tf.Variable(4.0)
        >>> with tf.GradientTape() as tape:
        ...     error = with_error_slope(tf.constant(0.5), bits, -0.6931472)
        >>> round(float(tape.gradient(error, bits)), 4)
        -0.6931
    """
    slope = tf.stop_gradient(2.0 * error * log_step_slope)
    return error + slope * (bits - tf.stop_gradient(bits))
