"""Rounding kernels to their grids, with gradients, in few passes over memory.

What rounding costs is to move weights between memory and cores. So kernels are handled by loops
of one result each, which XLA compiles: levels and error forth, the gradients by weights and steps
back. XLA fuses no sum with what is summed; a loop adds up equal parts of the rows, element by
element, and only what is left of it, an eighth, is summed by itself. Small kernels are left to
TensorFlow, operation by operation.
"""

import functools
from typing import NamedTuple

import tensorflow as tf

from keras_learnbits.numerics.grids import Grid, decode, nearest_codes
from keras_learnbits.numerics.xla import COMPILED_SIZE

# So many parts of a kernel are added up in a loop.
PARTS = 8


def fake_quantize(values, grid, rounded=None):
    """Rounds values to their grid, with gradients straight through the rounding.

    With `q = step * (code + offset)`, values `w` inside the range give (as in LSQ,
    arXiv 1902.08153)

        dq/dw = 1,    dq/dstep = (q - w) / step

    and those outside, which sit on the lowest or highest code,

        dq/dw = 0,    dq/dstep = q / step,    dq/doffset = step,    dq/dmax_code = step if above.

    Args:
        values: Float32 tensor.
        grid: `keras_learnbits.numerics.grids.Grid` whose tensors broadcast against `values`.
        rounded: What `levels_and_excess` gave for them, where it was computed before.

    Returns:
        Float32 tensor of the shape of `values`, `decode(encode(values, grid), grid)` exactly.

    Examples:
        >>> grid = Grid(tf.constant(1.0), tf.constant(-1.5), tf.constant(3.0))
        >>> fake_quantize(tf.constant([-9.0, -0.2, 0.3, 1.1]), grid).numpy().tolist()
        [-1.5, -0.5, 0.5, 1.5]
    """

    @tf.custom_gradient
    def levels(values, *grid):
        loops = _InTensorFlow(values, Grid(*grid), rounded)

        def gradient(upstream):
            upstream = tf.convert_to_tensor(upstream)
            return loops.each(_by_weights, upstream), *_by_grid(loops, upstream)

        return loops.each(_levels), gradient

    return levels(values, *grid)


def quantize_with_error(
    kernel, grid, by_bits=None, dtype="float32", fixed_range=False, fixed_step=False
):
    """`fake_quantize` and what it costs.

    Kernels of `COMPILED_SIZE` weights or more are handled by loops that XLA compiles.

    Args:
        kernel: Float32 tensor of a fixed shape.
        grid: `keras_learnbits.numerics.grids.Grid` whose tensors broadcast against `kernel`. It
            gets the gradients of the quantized kernel, and its step that of the error.
        by_bits: The same grid once more where gradients by the bits are wanted: it gets those of
            the quantized kernel alone, for errors see the bits in another way,
            `keras_learnbits.numerics.grids.with_error_slope`.
        dtype: Of the quantized kernel.
        fixed_range: Whether offset and highest code of `grid` are constants, without gradients.
        fixed_step: Likewise its step.

    Returns:
        `fake_quantize(kernel, grid)` in `dtype`; the squared error, `sum (q - w)**2`; and the
        squared norm, `sum w**2`, taken as a constant. The derivatives of the error are exact, as
        codes do not change under small changes: `2 * (w - q)` with respect to the weights, which
        pulls them to their levels, and `2 * sum (q - w) * q / step` with respect to the step.

    Examples:
        >>> grid = Grid(tf.constant(1.0), tf.constant(-1.5), tf.constant(3.0))
        >>> quantized, error, norm = quantize_with_error(tf.constant([0.5, 1.0]), grid)
        >>> quantized.numpy().tolist(), float(error), float(norm)
        ([0.5, 1.5], 0.25, 1.25)
    """

    @tf.custom_gradient
    def rounded(kernel, *grids):
        loops = _loops(kernel, Grid(*grids[:3]))

        def gradient(by_quantized, by_error):
            upstream, pull = tf.convert_to_tensor(by_quantized), 2.0 * by_error
            by_weights = loops.each(_by_weights_with_error, upstream, pull)
            # What nobody asks for, graphs leave out; but each of these operations takes its time
            # to trace.
            of_bits = _by_grid(loops, upstream) if by_bits or not fixed_range else [None] * 3
            of_range = [None] * 2 if fixed_range else of_bits[1:]
            of_step = None
            if not fixed_step:
                of_both = loops.summed(_by_step_with_error, grid.step.shape, upstream, pull)
                by_weights, of_step = loops.after(of_both, by_weights), of_both / loops.grid.step
            return by_weights, of_step, *of_range, *(of_bits if by_bits else ())

        error = loops.summed(_errors, tf.TensorShape([]))
        return (loops.each(_levels, dtype=dtype), error), gradient

    quantized, error = rounded(kernel, *grid, *(by_bits or ()))
    return quantized, error, tf.stop_gradient(2.0 * tf.nn.l2_loss(kernel))


def squared_error(kernel, grid, shape=()):
    """`sum (q - w)**2` of a kernel rounded to a grid, taken as a constant.

    Args:
        kernel: Float32 tensor of a fixed shape.
        grid: `keras_learnbits.numerics.grids.Grid` whose tensors broadcast against `kernel`.
        shape: Shape to sum to, which broadcasts against that of the kernel.

    Returns:
        Float32 tensor of that shape.

    Examples:
        >>> grid = Grid(tf.constant(1.0), tf.constant(-1.5), tf.constant(3.0))
        >>> float(squared_error(tf.constant([0.5, 1.0]), grid))
        0.25
    """
    return tf.stop_gradient(_loops(kernel, grid).summed(_errors, tf.TensorShape(shape)))


def _by_grid(loops, upstream):
    """Gradients of the quantized kernel by the three tensors of its grid."""
    step, offset, max_code = loops.grid
    return (
        loops.summed(_by_step, step.shape, upstream) / step,
        loops.summed(_by_offset, offset.shape, upstream),
        loops.summed(_by_max_code, max_code.shape, upstream),
    )


class Rounded(NamedTuple):
    """A kernel, its levels, and by how many codes each weight lies beyond the range."""

    weights: tf.Tensor
    levels: tf.Tensor
    beyond: tf.Tensor


def levels_and_excess(kernel, grid):
    """The levels of a kernel, and by how many codes each weight lies beyond the range."""
    codes, beyond = nearest_codes(kernel, grid)
    return decode(codes, grid), beyond


def _rounded(kernel, grid):
    return Rounded(kernel, *levels_and_excess(kernel, grid))


# Functions of each weight: of what is `Rounded`, its grid, and gradients.


def _levels(rounded, grid):
    return rounded.levels


def _errors(rounded, grid):
    return tf.square(rounded.levels - rounded.weights)


def _outside(rounded):
    """1 for weights beyond the range, else 0; as arithmetic, which takes less time than choices."""
    return tf.minimum(tf.abs(rounded.beyond), 1.0)


def _by_weights(rounded, grid, upstream):
    return upstream - upstream * _outside(rounded)


def _by_weights_with_error(rounded, grid, upstream, pull):
    return _by_weights(rounded, grid, upstream) - pull * (rounded.levels - rounded.weights)


def _by_step(rounded, grid, upstream):
    inside = rounded.weights - rounded.weights * _outside(rounded)
    return upstream * (rounded.levels - inside)


def _by_step_with_error(rounded, grid, upstream, pull):
    of_error = pull * (rounded.levels - rounded.weights) * rounded.levels
    return _by_step(rounded, grid, upstream) + of_error


def _by_offset(rounded, grid, upstream):
    return grid.step * upstream * _outside(rounded)


def _by_max_code(rounded, grid, upstream):
    above = tf.clip_by_value(rounded.beyond, 0.0, 1.0)
    return grid.step * upstream * above


# How they are computed: `each` weight's, or `summed` to the shape of a tensor that broadcasts
# against the kernel.


def is_compiled(kernel):
    """Whether a kernel has so many weights that XLA compiles how it is rounded."""
    return (kernel.shape.num_elements() or 0) >= COMPILED_SIZE  # None where a size is not fixed


def _loops(kernel, grid):
    return _InXLA(kernel, grid) if is_compiled(kernel) else _InTensorFlow(kernel, grid)


class _InTensorFlow:
    """Operation by operation; what is rounded forth serves for the way back, too."""

    def __init__(self, kernel, grid, rounded=None):
        self.rounded = Rounded(kernel, *(rounded or levels_and_excess(kernel, grid)))
        self.grid = grid

    def after(self, earlier, tensor):
        return tensor

    def each(self, function, *others, dtype="float32"):
        return _in_float32(function, dtype)(self.rounded, self.grid, *others)

    def summed(self, function, shape, *others):
        return _sum_to(self.each(function, *others), shape)


class _InXLA:
    """In compiled loops that each begin at the kernel, so that nothing is stored between."""

    def __init__(self, kernel, grid):
        self.kernel, self.grid = kernel, grid

    def after(self, earlier, tensor):
        """A tensor that is used after another is known, so that what both read is freed before."""
        with tf.control_dependencies([earlier]):
            return tf.identity(tensor)

    def each(self, function, *others, dtype="float32"):
        return _compiled(function, dtype)(self.kernel, self.grid, *others)

    def summed(self, function, shape, *others):
        rank = self.kernel.shape.rank
        shapes = [shape, *(each.shape for each in self.grid)]
        shapes = [(*[1] * (rank - len(each)), *each) for each in shapes]
        alone = [axis for axis in range(rank) if any(each[axis] > 1 for each in shapes)]
        shared = alone[0] if alone else rank  # so many leading axes become one, the rows
        shape_of_rows = -1, *self.kernel.shape[shared:]
        shape_of_sums, *shapes_of_grid = [each[shared:] for each in shapes]
        kernel, *others = [
            tf.reshape(each, shape_of_rows) if each.shape.rank else each
            for each in map(tf.convert_to_tensor, (self.kernel, *others))
        ]
        grid = Grid(*map(tf.reshape, self.grid, shapes_of_grid))
        sums, *rest = _compiled_sums(function)(kernel, grid, *others)
        if sums.shape.num_elements() >= COMPILED_SIZE and sums.shape[0] >= PARTS:
            sums, *more = _compiled_fold(sums)
            rest += more
        one_row = tf.TensorShape((1, *shape_of_sums))
        return tf.reshape(tf.add_n([_sum_to(each, one_row) for each in (sums, *rest)]), shape)


def _in_float32(function, dtype="float32"):
    """The function, with gradients in any precision taken to float32, its result in `dtype`."""

    def cast(rounded, grid, *others):
        others = [tf.cast(each, tf.float32) for each in others]
        return tf.cast(function(rounded, grid, *others), dtype)

    return cast


@functools.cache
def _compiled(function, dtype):
    @tf.function(jit_compile=True, autograph=False)
    def each(kernel, grid, *others):
        return _in_float32(function, dtype)(_rounded(kernel, grid), grid, *others)

    return each


@functools.cache
def _compiled_sums(function):
    @tf.function(jit_compile=True, autograph=False)
    def sums(kernel, grid, *others):
        def of_rows(rows, *others):
            return _in_float32(function)(_rounded(rows, grid), grid, *others)

        return _fold(of_rows, kernel, *others)

    return sums


@tf.function(jit_compile=True, autograph=False)
def _compiled_fold(rows):
    """By itself, for XLA would fuse it with the sum before, at great cost."""
    return _fold(lambda part: part, rows)


def _fold(function, *tensors):
    """A function of rows: the sum over equal parts of them, and the result for the remainder.

    Args:
        function: Of as many tensors.
        *tensors: Of as many rows, or scalars.

    Returns:
        One or two tensors whose rows add up to the sum.
    """
    rows = tensors[0].shape[0]
    size = rows // PARTS

    def part(start, stop):
        return function(*[each[start:stop] if each.shape.rank else each for each in tensors])

    results = []
    if size:
        results.append(tf.add_n([part(i * size, (i + 1) * size) for i in range(PARTS)]))
    if rows % PARTS:
        results.append(part(PARTS * size, rows))
    return results


def _sum_to(values, shape):
    """Sums values over the axes that a tensor of a shape broadcasts along."""
    if not shape.rank:
        return tf.reduce_sum(values)
    axes = [axis for axis, size in enumerate(shape) if size == 1]
    return tf.reduce_sum(values, axes, keepdims=True)
