"""Pure tensor functions: grids, their codes and their levels.

A kernel is rounded to a *grid* of `max_code + 1` evenly spaced levels

    level(code) = step * (code + offset),    code = 0, 1, ..., max_code

Everything is computed in float32. `step`, `offset` and `max_code` broadcast against the kernel: an
axis along which weights share them has size 1, or is missing.
"""

import math
from typing import NamedTuple

import tensorflow as tf

MIN_BITS = 1
MAX_BITS = 16
# Replaces the squared norm of a kernel of zeros in divisions.
TINY = 1e-30

# Step of the symmetric mid-rise grid of 2**bits levels with the least squared error on unit
# Gaussian weights, for 1, 2, ..., 16 bits; found by minimizing the error in closed form. Max,
# "Quantizing for Minimum Distortion", has the first ones: https://doi.org/10.1109/TIT.1960.1057548
GAUSSIAN_STEPS = (
    1.595769, 0.9956867, 0.5860194, 0.3352006, 0.1881388, 0.1040631, 0.05686777, 0.03076240,
    0.01649896, 0.008785460, 0.004649840, 0.002448416, 0.001283620, 6.704597e-4, 3.490671e-4,
    1.812283e-4,
)  # fmt: skip


class Grid(NamedTuple):
    """Evenly spaced levels `step * (code + offset)` for `code` in `0..max_code`.

    Attributes:
        step: Distance between two levels; positive.
        offset: Shift of the levels, in steps; a half-integer on mid-rise grids.
        max_code: The highest code, `2**bits - 1`.
    """

    step: tf.Tensor
    offset: tf.Tensor
    max_code: tf.Tensor


def integer_bits(bits):
    """Rounds a real bit-width to the integer in use; halves are rounded up.

    Examples:
        >>> integer_bits(tf.constant([2.4, 2.5, 3.5])).numpy().tolist()
        [2.0, 3.0, 4.0]
    """
    # Not `tf.round`, which rounds halves to the even neighbour.
    return tf.floor(bits + 0.5)


def max_code(bits):
    """The highest code, `2**B - 1` at the integer `B` nearest to `bits`.

    The derivative with respect to `bits` is that of `2**bits - 1` at `B`: `ln(2) * 2**B`.

    Examples:
        >>> max_code(tf.constant(2.7)).numpy().item()
        7.0
    """
    levels = 2.0 ** integer_bits(bits)
    # Its value is 0 and its derivative 1, so that a product with it adds a slope to a constant.
    zero = bits - tf.stop_gradient(bits)
    return tf.stop_gradient(levels) - 1.0 + math.log(2.0) * tf.stop_gradient(levels) * zero


def gaussian_grid(bits):
    """The best step of a mid-rise grid for unit Gaussian weights, and its highest code.

    The grid has `2**B` levels, where `B` is the integer nearest to `bits`. The derivative of the
    step with respect to `bits` is `step * gaussian_log_step_slope(bits)`, from the logarithms of
    the steps at the adjacent widths. The derivative of the code is that of `max_code`.

    Examples:
        >>> step, highest = gaussian_grid(tf.constant(1.0))
        >>> round(float(step), 4), float(highest)
        (1.5958, 1.0)
    """
    step, step_slope, highest, highest_slope = _gaussian_row(bits)
    zero = bits - tf.stop_gradient(bits)  # as in `max_code`
    return step + step_slope * zero, highest + highest_slope * zero


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
    """Derivative of the logarithm of the best step with respect to the bit-width.

    It is -0.47 at 1 bit and -0.65 at 16 bits.

    Examples:
        >>> round(float(gaussian_log_step_slope(tf.constant(4.0))), 3)
        -0.568
    """
    return tf.gather(tf.constant(_LOG_STEP_SLOPES, tf.float32), _table_index(bits))


def _gaussian_row(bits):
    # One lookup of all four numbers, because tracing and dispatch dominate small operations.
    row = tf.gather(tf.constant(_GAUSSIAN_GRIDS, tf.float32), _table_index(bits))
    return tf.unstack(row, num=4)


def _table_index(bits):
    return tf.cast(bits + 0.5, tf.int32)  # truncates, like `floor` for numbers > 0


def _log_step_slopes():
    logs = [math.log(step) for step in GAUSSIAN_STEPS]
    extended = [2 * logs[0] - logs[1], *logs, 2 * logs[-1] - logs[-2]]
    return [(after - before) / 2 for before, after in zip(extended, extended[2:], strict=False)]


# Rows are indexed by bits. Nothing reads row 0; it repeats that of 1 bit because
# `tf.debugging.enable_check_numerics` would report numbers that are not finite.
_LOG_STEP_SLOPES = [*_log_step_slopes()[:1], *_log_step_slopes()]
_GAUSSIAN_GRIDS = [
    (step, step * slope, 2**bits - 1, math.log(2.0) * 2**bits)
    for bits, (step, slope) in enumerate(
        zip((GAUSSIAN_STEPS[0], *GAUSSIAN_STEPS), _LOG_STEP_SLOPES, strict=True)
    )
]


def power_of_two_step(step, bits, log_scale, halved=False):
    """The power of two nearest to a step, on the logarithmic scale; exact.

    `exp` and `log` differ in the last place between TensorFlow's kernels, XLA and other devices.
    Two programs could then round a step half-way between two powers to different ones, a factor of
    2 apart. So the exponent is computed in integers, from the variable that all programs share.

    The derivative is that of the step, times their ratio: straight through the rounding of the
    logarithm, as in TQT (arXiv 1903.08066).

    Args:
        step: Float32 tensor, `gaussian_grid(bits)[0] * exp(log_scale)`, or half of it.
        bits: Float32 scalar, the latent bit-width.
        log_scale: Float32 tensor, natural logarithms of the scales.
        halved: Boolean tensor, whether `step` is half of that product.

    Returns:
        Float32 tensor of the shape of `step`.

    Examples:
        >>> bits, log_scales = tf.constant(2.0), tf.constant([-1.6, 0.3, 0.4])
        >>> step = gaussian_grid(bits)[0] * tf.exp(log_scales)
        >>> power_of_two_step(step, bits, log_scales).numpy().tolist()
        [0.25, 1.0, 2.0]
    """
    scale = tf.cast(tf.floor(log_scale * _PER_LOG), tf.int64)  # exact
    best = tf.gather(tf.constant(_LOG2_STEPS, tf.int64), _table_index(bits))
    exponent = tf.math.floordiv(scale * _LOG2_PER_UNIT + best, _ONE)
    power = _power(exponent - tf.cast(halved, tf.int64))
    ratio = tf.stop_gradient(tf.math.divide_no_nan(power, step))
    return power + (step - tf.stop_gradient(step)) * ratio


# Logarithms to base 2 in units of 2**-32: of each best step, plus a half, so that `floordiv` rounds
# to the nearest integer. Row 0 is not used. Logarithms of scales are in units of 1/4096.
_ONE = 2**32
_PER_LOG = 4096.0
_LOG2_PER_UNIT = round(_ONE / (_PER_LOG * math.log(2.0)))
_LOG2_STEPS = [
    round(_ONE * (math.log2(step) + 0.5)) + _LOG2_PER_UNIT // 2
    for step in (GAUSSIAN_STEPS[0], *GAUSSIAN_STEPS)
]


def _power(exponent):
    """`2**exponent` within the normal float32 numbers, exactly; `tf.pow` may be inexact."""
    exponent = tf.cast(tf.clip_by_value(exponent, -126, 127), tf.int32)
    return tf.stop_gradient(tf.bitcast((exponent + 127) * 2**23, tf.float32))


def power_above(values):
    """The smallest powers of two that are not below positive float32 numbers, exactly.

    Examples:
        >>> power_above(tf.constant([0.3, 0.5, 5.0])).numpy().tolist()
        [0.5, 0.5, 8.0]
    """
    below = tf.bitcast(tf.bitwise.bitwise_and(tf.bitcast(values, tf.int32), 0x7F800000), tf.float32)
    return tf.where(below < values, 2.0 * below, below)


def fixed_point(values, bits):
    """Values rounded to integers times a power of two, the smallest at which `bits` bits suffice.

    Gradients pass straight through. A second rounding changes nothing.

    Args:
        values: Float32 tensor.
        bits: Number of bits, including the sign. If the largest magnitude is a power of two, it
            takes one more bit, so that it is exact.

    Examples:
        >>> fixed_point(tf.constant([0.3, -0.9, 0.01]), bits=4).numpy().tolist()
        [0.25, -0.875, 0.0]
    """
    largest = tf.reduce_max(tf.abs(values))
    step = power_above(tf.maximum(largest, 2.0**-100)) * 2.0 ** (1 - bits)
    rounded = tf.floor(values / step + 0.5) * step
    return tf.stop_gradient(rounded) + (values - tf.stop_gradient(values))


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
    """`encode`, and by how many codes each weight lies outside the range; negative below it.

    Examples:
        >>> grid = Grid(tf.constant(1.0), tf.constant(-1.5), tf.constant(3.0))
        >>> codes, excess = nearest_codes(tf.constant([-3.0, 0.4]), grid)
        >>> codes.numpy().tolist(), excess.numpy().tolist()
        ([0.0, 2.0], [-1.0, 0.0])
    """
    # Divides and does not multiply by a reciprocal: compilers would fuse that product with the
    # subtraction (FMA), which rounds differently, and files would hold other codes.
    position = kernel / grid.step - grid.offset
    nearest = tf.floor(position + 0.5)
    codes = tf.clip_by_value(nearest, 0.0, grid.max_code)
    return codes, nearest - codes


def decode(codes, grid):
    """Levels that belong to codes: `step * (code + offset)`, float32."""
    return grid.step * (codes + grid.offset)


def with_error_slope(error, bits, log_step_slope):
    """Gives a squared error the derivative with respect to `bits` that it has without clipping.

    While no weight is clipped the error grows with the square of the step, so
    `d error / d bits = 2 * error * log_step_slope`: -1.39 times the error if one more bit halves
    the step. This is the linearization of the published method. The exact change is -0.75 times
    the error for one bit more, and +3 times for one bit fewer.

    Examples:
        >>> bits = tf.Variable(4.0)
        >>> with tf.GradientTape() as tape:
        ...     error = with_error_slope(tf.constant(0.5), bits, -0.6931472)
        >>> round(float(tape.gradient(error, bits)), 4)
        -0.6931
    """
    slope = tf.stop_gradient(2.0 * error * log_step_slope)
    return error + slope * (bits - tf.stop_gradient(bits))
