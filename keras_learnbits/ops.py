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
# A kernel of zeros has no energy to divide by, and no error either.
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

    >>> integer_bits(tf.constant([2.4, 2.5, 3.5])).numpy().tolist()
    [2.0, 3.0, 4.0]
    """
    return tf.floor(bits + 0.5)


def _with_slope(value, slope, at):
    """`value`, bit for bit, with derivative `slope` in `at`."""
    at_is_zero = at - tf.stop_gradient(at)
    return tf.stop_gradient(value) + tf.stop_gradient(slope) * at_is_zero


def max_code(bits):
    """The highest code, `2**B - 1` at the integer `B` nearest to `bits`.

    Differentiable in `bits` as if they were real: the derivative is `ln(2) * 2**B`.

    >>> max_code(tf.constant(2.7)).numpy().item()
    7.0
    """
    levels = 2.0 ** integer_bits(bits)
    return _with_slope(levels - 1.0, math.log(2.0) * levels, bits)


def gaussian_step(bits):
    """Best step of a `2**B`-level mid-rise grid for unit Gaussian weights.

    `B` is the integer nearest to `bits`. The derivative in `bits` is that of the table
    interpolated in the logarithm, `step * (log step(B+1) - log step(B-1)) / 2`.

    >>> round(float(gaussian_step(tf.constant(1.0))), 4)
    1.5958
    """
    step = tf.gather(tf.constant(GAUSSIAN_STEPS), _table_index(bits))
    return _with_slope(step, step * gaussian_log_step_slope(bits), bits)


def gaussian_log_step_slope(bits):
    """Derivative of `log(gaussian_step(bits))` by the bits: -0.47 at 1 bit, -0.65 at 16.

    >>> round(float(gaussian_log_step_slope(tf.constant(4.0))), 3)
    -0.568
    """
    logs = [math.log(step) for step in GAUSSIAN_STEPS]
    extended = [2 * logs[0] - logs[1], *logs, 2 * logs[-1] - logs[-2]]
    slopes = [(extended[i + 2] - extended[i]) / 2 for i in range(len(logs))]
    return tf.gather(tf.constant(slopes), _table_index(bits))


def _table_index(bits):
    return tf.cast(integer_bits(bits), tf.int32) - MIN_BITS


def encode(kernel, grid):
    """Codes of the levels nearest to the kernel's weights.

    Args:
        kernel: Float tensor.
        grid: `Grid`.

    Returns:
        Float32 tensor of the kernel's shape with integers in `0..max_code`.
    """
    # Not times a reciprocal: compilers would fuse it with the sum, and round otherwise.
    position = tf.cast(kernel, tf.float32) / grid.step - grid.offset
    return tf.clip_by_value(tf.floor(position + 0.5), 0.0, grid.max_code)


def decode(codes, grid):
    """Levels that belong to codes: `step * (code + offset)`, float32."""
    return grid.step * (codes + grid.offset)


def _sum_to(values, shape):
    """Sums `values` over the axes that a tensor of `shape` broadcasts along."""
    if not shape.rank:
        return tf.reduce_sum(values)
    axes = [axis for axis, size in enumerate(shape) if size == 1]
    return tf.reduce_sum(values, axes, keepdims=True)


def _total(values):
    """The sum of all values; along the last axis at the end, which compilers can vectorize."""
    return tf.reduce_sum(tf.reduce_sum(values, range(max(values.shape.rank - 1, 0))))


def _outside(kernel, grid):
    """Where weights lie below and above the range of a grid."""
    position = kernel / grid.step - grid.offset
    return position < -0.5, position >= grid.max_code + 0.5


def _to_kernel_and_step(kernel, grid, quantized, upstream):
    """Gradients by kernel and step, straight through the rounding."""
    below, above = _outside(kernel, grid)
    inside = tf.logical_not(tf.logical_or(below, above))
    residual = tf.where(inside, quantized - kernel, quantized)
    to_step = _sum_to(upstream * residual, grid.step.shape) / grid.step
    return tf.where(inside, upstream, 0.0), to_step


def _to_offset_and_max_code(kernel, grid, upstream):
    """Gradients by offset and highest code, which come from weights beyond the range."""
    below, above = _outside(kernel, grid)
    outside = tf.where(tf.logical_or(below, above), upstream, 0.0)
    to_max_code = tf.where(above, upstream, 0.0)
    return (
        _sum_to(grid.step * outside, grid.offset.shape),
        _sum_to(grid.step * to_max_code, grid.max_code.shape),
    )


def fake_quantize(kernel, grid):
    """Rounds a kernel to its grid, with gradients straight through the rounding.

    With `q = step * (code + offset)`, weights `w` inside the range give (as in LSQ,
    arXiv 1902.08153)

        dq/dw = 1,    dq/dstep = (q - w) / step

    and those outside, which sit on the lowest or highest code,

        dq/dw = 0,    dq/dstep = q / step,    dq/doffset = step,    dq/dmax_code = step if above.

    Args:
        kernel: Float32 tensor.
        grid: `Grid` whose tensors broadcast against `kernel`.

    Returns:
        Float32 tensor of the kernel's shape, `decode(encode(kernel, grid), grid)` exactly.

    Example:
    >>> grid = Grid(tf.constant(1.0), tf.constant(-1.5), tf.constant(3.0))
    >>> fake_quantize(tf.constant([-9.0, -0.2, 0.3, 1.1]), grid).numpy().tolist()
    [-1.5, -0.5, 0.5, 1.5]
    """

    @tf.custom_gradient
    def rounded(kernel, step, offset, max_code):
        grid = Grid(step, offset, max_code)
        quantized = decode(encode(kernel, grid), grid)

        def gradient(upstream):
            upstream = tf.convert_to_tensor(upstream)
            return (
                *_to_kernel_and_step(kernel, grid, quantized, upstream),
                *_to_offset_and_max_code(kernel, grid, upstream),
            )

        return quantized, gradient

    return rounded(kernel, *grid)


def quantize_with_error(kernel, grid, error_step, dtype="float32"):
    """`fake_quantize` and what it costs, in one pass over the kernel, and one pass back.

    Kernels of `COMPILED_SIZE` weights or more are handled by functions that XLA compiles.

    Args:
        kernel: Float32 tensor of a fixed shape.
        grid: `Grid` whose tensors broadcast against `kernel`.
        error_step: The step once more; it gets the gradient of the error, whose offset is constant.
        dtype: Of the quantized kernel.

    Returns:
        `fake_quantize(kernel, grid)` in `dtype`; the squared error, `sum (q - w)**2`; and the
        energy, `sum w**2`, taken as a constant. The derivatives of the error are the true ones,
        since codes do not change under small changes: `2 * (w - q)` by the weights, which pulls
        them to their levels, and `2 * sum (q - w) * q / step` by the step.

    Example:
    >>> grid = Grid(tf.constant(1.0), tf.constant(-1.5), tf.constant(3.0))
    >>> quantized, error, energy = quantize_with_error(tf.constant([0.5, 1.0]), grid, grid.step)
    >>> quantized.numpy().tolist(), float(error), float(energy)
    ([0.5, 1.5], 0.25, 1.25)
    """
    large = kernel.shape.num_elements() >= COMPILED_SIZE
    forward, backward, range_backward = _COMPILED if large else _PASSES

    @tf.custom_gradient
    def rounded(kernel, step, offset, max_code, error_step):
        def gradient(by_quantized, by_error, by_energy):
            del by_energy
            arguments = kernel, step, offset, max_code, by_quantized
            to_kernel, to_step, to_error_step = backward(*arguments, by_error)
            # By itself, so that it is left out where no gradient by the bits is asked for.
            return to_kernel, to_step, *range_backward(*arguments), to_error_step

        return forward(kernel, step, offset, max_code, dtype), gradient

    return rounded(kernel, *grid, error_step)


def _forward(kernel, step, offset, max_code, dtype):
    grid = Grid(step, offset, max_code)
    quantized = decode(encode(kernel, grid), grid)
    error = _total(tf.square(quantized - kernel))
    return tf.cast(quantized, dtype), error, _total(tf.square(kernel))


def _backward(kernel, step, offset, max_code, by_quantized, by_error):
    grid = Grid(step, offset, max_code)
    quantized = decode(encode(kernel, grid), grid)
    upstream = tf.cast(by_quantized, tf.float32)
    to_kernel, to_step = _to_kernel_and_step(kernel, grid, quantized, upstream)
    by_residual = 2.0 * by_error * (quantized - kernel)
    to_error_step = _sum_to(by_residual * quantized, step.shape) / step
    return to_kernel - by_residual, to_step, to_error_step


def _range_backward(kernel, step, offset, max_code, by_quantized):
    grid = Grid(step, offset, max_code)
    return _to_offset_and_max_code(kernel, grid, tf.cast(by_quantized, tf.float32))


# From so many weights on, what XLA saves in a step is worth the time that it compiles.
COMPILED_SIZE = 2**16
_PASSES = (_forward, _backward, _range_backward)
_COMPILED = tuple(tf.function(function, jit_compile=True) for function in _PASSES)


def with_error_slope(error, bits, log_step_slope):
    """`error` with the derivative in `bits` that a squared error has while no weight is clipped.

    There it grows as the square of the step, so `d error / d bits = 2 * error * log_step_slope`:
    -1.39 times the error where one bit more halves the step. This is the linearization of the
    published method; the exact difference to one bit more is -0.75 times the error, to one
    fewer +3 times.

    >>> bits = tf.Variable(4.0)
    >>> with tf.GradientTape() as tape:
    ...     error = with_error_slope(tf.constant(0.5), bits, -0.6931472)
    >>> round(float(tape.gradient(error, bits)), 4)
    -0.6931
    """
    slope = tf.stop_gradient(2.0 * error * log_step_slope)
    return error + slope * (bits - tf.stop_gradient(bits))
