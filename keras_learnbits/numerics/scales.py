"""Scales of a grid: their initial values, and a search for those with the least error."""

import math

import numpy as np
import tensorflow as tf

# Number of scales that a search tries. From half to twice the initial scale they are 3.6% apart.
CANDIDATES = 40
# Scale of a channel of zeros, as a share of that of the whole kernel. Grids without a level at 0
# round its weights to half a step.
OF_ZEROS = 2.0**-8
# Number of squares, 8 bytes each, that are kept in memory at the same time.
SQUARES_AT_ONCE = 2**22


def log_root_mean_square(values, shape):
    """Logarithm of the root mean square of the weights that share a scale.

    A channel of zeros gets the value of the whole kernel. A kernel of zeros gets
    `1 / sqrt(fan_in)`, so that training can move it away from zero.

    Args:
        values: Float tensor, the kernel.
        shape: Shape of the scales, which broadcasts against the kernel's.

    Returns:
        Float32 tensor of that shape.

    Examples:
        >>> kernel = tf.constant([[3.0, 0.0], [3.0, 0.0]])
        >>> print(tf.exp(log_root_mean_square(kernel, (1, 2))).numpy().round(3))
        [[3.    2.121]]
    """
    values = tf.convert_to_tensor(values)
    fan_in = values.shape.num_elements() / math.prod(shape)
    mean_square = _sum_of_squares(values, shape) / fan_in
    overall = tf.reduce_mean(mean_square)
    overall = tf.where(overall > 0, overall, 1.0 / fan_in)
    mean_square = tf.where(mean_square > 0, mean_square, overall)
    return tf.cast(0.5 * tf.math.log(mean_square), tf.float32)


def search_range(values, start, half_range):
    """The range in which `search` looks for scales.

    It reaches from half to twice the start, or further if the largest weight would be clipped. For
    a channel of zeros in a kernel that has other weights, it is a single small scale.

    Args:
        values: Float32 tensor, the kernel.
        start: Float32 tensor, logarithms of the scales.
        half_range: Float32 tensor, magnitude of the outermost level at these scales.

    Returns:
        Logarithms of the lowest scales, and the differences between those of the highest and the
        lowest ones: two tensors of the shape of `start`.
    """
    largest = tf.reduce_max(tf.abs(values), shared_axes(start.shape), keepdims=True)
    unclipped = tf.math.log(tf.maximum(largest / half_range, 1e-30))
    low, high = tf.minimum(unclipped, -math.log(2)), tf.maximum(unclipped, math.log(2))
    of_zeros = tf.where(tf.reduce_any(largest > 0), math.log(OF_ZEROS), 0.0)
    is_zero = tf.equal(largest, 0)
    return start + tf.where(is_zero, of_zeros, low), tf.where(is_zero, 0.0, high - low)


def search(error_at, start, low, reach):
    """The scales with the least error among evenly spaced candidates.

    Args:
        error_at: Function of a tensor of logarithms of scales to the errors of each, of the same
            shape.
        start: Float32 tensor, the result if no error is finite.
        low: Float32 tensor of the shape of `start`, the lowest candidates.
        reach: Float32 tensor of the shape of `start`, the highest candidates minus the lowest.

    Returns:
        Float32 tensor of the shape of `start`.

    Examples:
        >>> def error_at(log_scale):
        ...     return tf.square(log_scale - 1.0)
        >>> search(error_at, tf.zeros(1), -tf.ones(1), tf.constant([3.9])).numpy().round(3).tolist()
        [1.0]
    """
    shares = tf.constant(np.linspace(0, 1, CANDIDATES, dtype="float32"))

    def tried(index, best, least):
        candidate = low + shares[index] * reach
        error = error_at(candidate)
        return index + 1, tf.where(error < least, candidate, best), tf.minimum(error, least)

    # A loop in the graph: TensorFlow traces its body once instead of once per candidate.
    least = tf.fill(tf.shape(start), np.finfo(np.float32).max)
    state = tf.constant(0), start, least
    return tf.while_loop(lambda index, *_: index < CANDIDATES, tried, state)[1]


def shared_axes(shape):
    """Axes of a kernel along which weights share a scale, a tuple of integers."""
    return tuple(axis for axis, size in enumerate(shape) if size == 1)


def _sum_of_squares(values, shape):
    """Sum of squares in float64, in a given shape.

    Large kernels are summed in parts, because their squares in float64 need twice their memory.
    """
    axes = shared_axes(shape)
    rows_at_once = max(1, SQUARES_AT_ONCE * values.shape[0] // values.shape.num_elements())
    if 0 not in axes or rows_at_once >= values.shape[0]:
        return tf.reduce_sum(tf.square(tf.cast(values, tf.float64)), axes, keepdims=True)
    starts = range(0, values.shape[0], rows_at_once)
    return tf.add_n([_sum_of_squares(values[i : i + rows_at_once], shape) for i in starts])
