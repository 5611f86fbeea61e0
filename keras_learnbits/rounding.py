"""Rounding kernels to their grids, with gradients, in few passes over memory.

What rounding costs is to move weights between memory and cores. So kernels are handled by loops
of one result each, which XLA compiles: levels and error, then the gradients by weights and steps.
XLA fuses no sum with what is summed; a loop adds up equal parts of the kernel, element by
element, and only what is left of it, an eighth, is summed by itself.
"""

import functools
import math

import tensorflow as tf

from keras_learnbits.ops import Grid, decode, nearest_codes

# From so many weights on, what XLA saves in a step is worth the time that it compiles.
COMPILED_SIZE = 2**16
# At most so many parts of a kernel are added up in a loop.
MOST_PARTS = 8


def fake_quantize(values, grid):
    """Rounds values to their grid, with gradients straight through the rounding.

    With `q = step * (code + offset)`, values `w` inside the range give (as in LSQ,
    arXiv 1902.08153)

        dq/dw = 1,    dq/dstep = (q - w) / step

    and those outside, which sit on the lowest or highest code,

        dq/dw = 0,    dq/dstep = q / step,    dq/doffset = step,    dq/dmax_code = step if above.

    Args:
        values: Float32 tensor.
        grid: `keras_learnbits.ops.Grid` whose tensors broadcast against `values`.

    Returns:
        Float32 tensor of the shape of `values`, `decode(encode(values, grid), grid)` exactly.

    Example:
    >>> grid = Grid(tf.constant(1.0), tf.constant(-1.5), tf.constant(3.0))
    >>> fake_quantize(tf.constant([-9.0, -0.2, 0.3, 1.1]), grid).numpy().tolist()
    [-1.5, -0.5, 0.5, 1.5]
    """

    @tf.custom_gradient
    def rounded(values, *grid):
        grid = Grid(*grid)

        def gradient(upstream):
            upstream = tf.convert_to_tensor(upstream)
            by_grid = _by_grid(_summed_by_tensorflow, values, grid, upstream)
            return _by_weights(values, grid, upstream), *by_grid

        return _levels(values, grid), gradient

    return rounded(values, *grid)


def quantize_with_error(kernel, grid, by_bits=None, dtype="float32"):
    """`fake_quantize` and what it costs.

    Kernels of `COMPILED_SIZE` weights or more are handled by loops that XLA compiles.

    Args:
        kernel: Float32 tensor of a fixed shape.
        grid: `keras_learnbits.ops.Grid` whose tensors broadcast against `kernel`. Its step gets
            the gradients of the quantized kernel and of the error.
        by_bits: The same grid once more where gradients by the bits are wanted: it gets those of
            the quantized kernel alone, for errors see the bits in another way,
            `keras_learnbits.ops.with_error_slope`.
        dtype: Of the quantized kernel.

    Returns:
        `fake_quantize(kernel, grid)` in `dtype`; the squared error, `sum (q - w)**2`; and the
        energy, `sum w**2`, taken as a constant. The derivatives of the error are the true ones,
        since codes do not change under small changes: `2 * (w - q)` by the weights, which pulls
        them to their levels, and `2 * sum (q - w) * q / step` by the step.

    Example:
    >>> grid = Grid(tf.constant(1.0), tf.constant(-1.5), tf.constant(3.0))
    >>> quantized, error, energy = quantize_with_error(tf.constant([0.5, 1.0]), grid)
    >>> quantized.numpy().tolist(), float(error), float(energy)
    ([0.5, 1.5], 0.25, 1.25)
    """
    each, summed = _loops(kernel)

    @tf.custom_gradient
    def rounded(kernel, step, *by_bits):
        now = grid._replace(step=step)

        def gradient(by_quantized, by_error, by_energy):
            del by_energy
            upstream = tf.cast(by_quantized, tf.float32)
            by_step = summed(_by_step_with_error, step.shape, kernel, now, upstream, by_error)
            by_weights = each(_by_weights_with_error, kernel, now, upstream, by_error)
            rest = _by_grid(summed, kernel, now, upstream) if by_bits else ()
            return by_weights, by_step / step, *rest

        error = summed(_errors, tf.TensorShape([]), kernel, now)
        energy = 2.0 * tf.nn.l2_loss(kernel)
        return (tf.cast(each(_levels, kernel, now), dtype), error, energy), gradient

    return rounded(kernel, grid.step, *(by_bits or ()))


def squared_error(kernel, grid):
    """`sum (q - w)**2` of a kernel rounded to a grid, taken as a constant.

    Args:
        kernel: Float32 tensor of a fixed shape.
        grid: `keras_learnbits.ops.Grid` whose tensors broadcast against `kernel`.

    Returns:
        Float32 scalar.

    Example:
    >>> grid = Grid(tf.constant(1.0), tf.constant(-1.5), tf.constant(3.0))
    >>> float(squared_error(tf.constant([0.5, 1.0]), grid))
    0.25
    """
    _, summed = _loops(kernel)
    return tf.stop_gradient(summed(_errors, tf.TensorShape([]), kernel, grid))


def _by_grid(summed, kernel, grid, upstream):
    """Gradients of the quantized kernel by the three tensors of its grid."""
    arguments = kernel, grid, upstream
    return (
        summed(_by_step, grid.step.shape, *arguments) / grid.step,
        summed(_by_offset, grid.offset.shape, *arguments),
        summed(_by_max_code, grid.max_code.shape, *arguments),
    )


# What follows are functions of each weight: of the kernel, its grid, and gradients.


def _levels(kernel, grid):
    codes, _ = nearest_codes(kernel, grid)
    return decode(codes, grid)


def _errors(kernel, grid):
    return tf.square(_levels(kernel, grid) - kernel)


def _by_weights(kernel, grid, upstream):
    _, beyond = nearest_codes(kernel, grid)
    return tf.where(tf.equal(beyond, 0.0), upstream, 0.0)


def _by_weights_with_error(kernel, grid, upstream, by_error):
    of_error = 2.0 * by_error * (_levels(kernel, grid) - kernel)
    return _by_weights(kernel, grid, upstream) - of_error


def _by_step(kernel, grid, upstream):
    codes, beyond = nearest_codes(kernel, grid)
    return upstream * (decode(codes, grid) - tf.where(tf.equal(beyond, 0.0), kernel, 0.0))


def _by_step_with_error(kernel, grid, upstream, by_error):
    quantized = _levels(kernel, grid)
    of_error = 2.0 * by_error * (quantized - kernel) * quantized
    return _by_step(kernel, grid, upstream) + of_error


def _by_offset(kernel, grid, upstream):
    _, beyond = nearest_codes(kernel, grid)
    return grid.step * tf.where(tf.equal(beyond, 0.0), 0.0, upstream)


def _by_max_code(kernel, grid, upstream):
    _, beyond = nearest_codes(kernel, grid)
    return grid.step * tf.where(beyond > 0.0, upstream, 0.0)


# And these say how they are computed: for each weight, and summed to the shape of a tensor that
# broadcasts against the kernel.


def _loops(kernel):
    """Two functions that compute one of the above: for each weight, and summed to a shape."""
    if kernel.shape.num_elements() >= COMPILED_SIZE:
        return _each_by_xla, _summed_by_xla
    return _each_by_tensorflow, _summed_by_tensorflow


def _each_by_tensorflow(function, *arguments):
    return function(*arguments)


def _summed_by_tensorflow(function, shape, *arguments):
    return _sum_to(function(*arguments), shape)


@functools.cache
def _compiled(function):
    return tf.function(function, jit_compile=True)


def _each_by_xla(function, *arguments):
    return _compiled(function)(*arguments)


def _summed_by_xla(function, shape, kernel, grid, *others):
    rank = kernel.shape.rank
    widened = [(*[1] * (rank - len(each)), *each) for each in (shape, *(t.shape for t in grid))]
    alone = [axis for axis in range(rank) if any(each[axis] > 1 for each in widened)]
    shared = alone[0] if alone else rank  # so many leading axes become one, the rows
    rows, rest = math.prod(kernel.shape[:shared]), kernel.shape[shared:]
    shape_of_sums, *shapes_of_grid = [each[shared:] for each in widened]
    kernel, *others = [
        tf.reshape(each, (rows, *rest)) if each.shape.rank else each
        for each in map(tf.convert_to_tensor, (kernel, *others))
    ]
    grid = grid and Grid(*map(tf.reshape, grid, shapes_of_grid))
    sums = _compiled_sum(function)(kernel, grid, *others)
    sums = _compiled_sum(_itself)(sums, ())
    return tf.reshape(_sum_to(sums, tf.TensorShape((1, *shape_of_sums))), shape)


@functools.cache
def _compiled_sum(function):
    """A function of each weight, summed over rows as far as these fall into equal parts."""

    @tf.function(jit_compile=True)
    def summed(kernel, grid, *others):
        parts = _parts(kernel)
        weights, *others = [
            tf.split(each, parts) if each.shape.rank else [each] * parts
            for each in (kernel, *others)
        ]
        arguments = zip(weights, [grid] * parts, *others, strict=True)
        return tf.add_n([function(*each) for each in arguments])

    return summed


def _parts(rows):
    """Into how many equal parts rows fall."""
    return max(parts for parts in range(1, MOST_PARTS + 1) if rows.shape[0] % parts == 0)


def _itself(values, grid):
    return values


def _sum_to(values, shape):
    """Sums values over the axes that a tensor of a shape broadcasts along."""
    if not shape.rank:
        return tf.reduce_sum(values)
    axes = [axis for axis, size in enumerate(shape) if size == 1]
    return tf.reduce_sum(values, axes, keepdims=True)
