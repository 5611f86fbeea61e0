"""Rounding kernels to their grids, with gradients, in few passes over memory.

Rounding is memory-bound: moving weights between memory and cores takes longer than the arithmetic.
So for large kernels XLA compiles one loop per result: the levels and the error in the forward pass,
the gradients with respect to weights and steps in the backward pass. On CPUs XLA does not fuse a
reduction with the computation of its operand. Therefore a loop adds up equal parts of the rows,
element by element, and only its result, an eighth of the size, is reduced separately. For small
kernels TensorFlow runs operation by operation, because compiling would take longer than it saves.
"""

import functools
from typing import NamedTuple

import tensorflow as tf

from keras_learnbits.numerics.grids import Grid, decode, nearest_codes
from keras_learnbits.numerics.xla import COMPILED_SIZE

# Number of parts of a kernel that a loop adds up.
PARTS = 8


def fake_quantize(values, grid, rounded=None):
    """Rounds values to their grid, with gradients straight through the rounding.

    With `q = step * (code + offset)`, values `w` inside the range have the gradients (as in LSQ,
    arXiv 1902.08153)

        dq/dw = 1,    dq/dstep = (q - w) / step

    and values outside, which are clipped to the lowest or highest code,

        dq/dw = 0,    dq/dstep = q / step,    dq/doffset = step,    dq/dmax_code = step if above.

    Args:
        values: Float32 tensor.
        grid: `keras_learnbits.numerics.grids.Grid` whose tensors broadcast against `values`.
        rounded: Result of `levels_and_excess` for the values, if it is known already.

    Returns:
        Float32 tensor of the shape of `values`, `decode(encode(values, grid), grid)` exactly.

    Examples:
        >>> grid = Grid(tf.constant(1.0), tf.constant(-1.5), tf.constant(3.0))
        >>> fake_quantize(tf.constant([-9.0, -0.2, 0.3, 1.1]), grid).numpy().tolist()
        [-1.5, -0.5, 0.5, 1.5]
    """

    # In closed form: TensorFlow would keep each intermediate result for the backward pass, and the
    # derivative of `floor`, which is 0, would have to be bypassed with `stop_gradient`.
    @tf.custom_gradient
    def levels(values, *grid):
        passes = _TensorFlowOps(values, Grid(*grid), rounded)

        def gradient(upstream):
            upstream = tf.convert_to_tensor(upstream)
            return passes.each(_weight_gradient, upstream), *_grid_gradients(passes, upstream)

        return passes.each(_levels), gradient

    return levels(values, *grid)


def quantize_with_error(
    kernel, grid, by_bits=None, dtype="float32", fixed_range=False, fixed_step=False
):
    """`fake_quantize` of a kernel, with its squared error and its squared norm.

    XLA compiles this for kernels of `COMPILED_SIZE` weights or more.

    Args:
        kernel: Float32 tensor of a fixed shape.
        grid: `keras_learnbits.numerics.grids.Grid` whose tensors broadcast against `kernel`. It
            gets the gradients of the quantized kernel, and its step also that of the error.
        by_bits: `Grid` with the same values as a function of the bit-width, or None. It gets the
            gradients of the quantized kernel only, because the error has a separate derivative
            with respect to the bit-width, `keras_learnbits.numerics.grids.with_error_slope`.
        dtype: Name of the dtype of the quantized kernel.
        fixed_range: Whether offset and highest code of `grid` are constants, without gradients.
        fixed_step: Whether the step of `grid` is a constant, without gradients.

    Returns:
        `fake_quantize(kernel, grid)` in `dtype`; the squared error, `sum (q - w)**2`; and the
        squared norm, `sum w**2`, a constant for gradients. The derivatives of the error are exact,
        because small changes do not change the codes: `2 * (w - q)` with respect to the weights,
        which pulls them to their levels, and `2 * sum (q - w) * q / step` with respect to the step.

    Examples:
        >>> grid = Grid(tf.constant(1.0), tf.constant(-1.5), tf.constant(3.0))
        >>> quantized, error, norm = quantize_with_error(tf.constant([0.5, 1.0]), grid)
        >>> quantized.numpy().tolist(), float(error), float(norm)
        ([0.5, 1.5], 0.25, 1.25)
    """

    @tf.custom_gradient
    def rounded(kernel, *grids):
        passes = _passes(kernel, Grid(*grids[:3]))

        def gradient(by_quantized, by_error):
            upstream, pull = tf.convert_to_tensor(by_quantized), 2.0 * by_error
            of_weights = passes.each(_weight_gradient_with_error, upstream, pull)
            # TensorFlow prunes gradients that nothing reads, but only after tracing each operation,
            # so those that are known to be unused are not made.
            of_grid = (
                _grid_gradients(passes, upstream) if by_bits or not fixed_range else [None] * 3
            )
            of_range = [None] * 2 if fixed_range else of_grid[1:]
            of_step = None
            if not fixed_step:
                of_both = passes.summed(_step_gradient_with_error, grid.step.shape, upstream, pull)
                of_weights, of_step = passes.after(of_both, of_weights), of_both / passes.grid.step
            return of_weights, of_step, *of_range, *(of_grid if by_bits else ())

        error = passes.summed(_errors, tf.TensorShape([]))
        return (passes.each(_levels, dtype=dtype), error), gradient

    quantized, error = rounded(kernel, *grid, *(by_bits or ()))
    return quantized, error, tf.stop_gradient(2.0 * tf.nn.l2_loss(kernel))


def squared_error(kernel, grid, shape=()):
    """`sum (q - w)**2` of a kernel rounded to a grid, a constant for gradients.

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
    return tf.stop_gradient(_passes(kernel, grid).summed(_errors, tf.TensorShape(shape)))


def _grid_gradients(passes, upstream):
    """Gradients of the quantized kernel with respect to the three tensors of its grid."""
    step, offset, max_code = passes.grid
    return (
        passes.summed(_step_gradient, step.shape, upstream) / step,
        passes.summed(_offset_gradient, offset.shape, upstream),
        passes.summed(_max_code_gradient, max_code.shape, upstream),
    )


class Rounded(NamedTuple):
    """A kernel, its levels, and by how many codes each weight lies outside the range."""

    weights: tf.Tensor
    levels: tf.Tensor
    excess: tf.Tensor


def levels_and_excess(kernel, grid):
    """The levels of a kernel, and by how many codes each weight lies outside the range."""
    codes, excess = nearest_codes(kernel, grid)
    return decode(codes, grid), excess


def _rounded(kernel, grid):
    return Rounded(kernel, *levels_and_excess(kernel, grid))


# Elementwise functions of a `Rounded` kernel, of its grid, and of the gradients of the results:
# `upstream` is that of the quantized kernel, `pull` twice that of the squared error.


def _levels(rounded, grid):
    return rounded.levels


def _errors(rounded, grid):
    return tf.square(rounded.levels - rounded.weights)


def _outside(rounded):
    """1 for weights outside the range, else 0."""
    # The excess is an integer. Arithmetic on it is faster than comparing and selecting.
    return tf.minimum(tf.abs(rounded.excess), 1.0)


def _weight_gradient(rounded, grid, upstream):
    return upstream - upstream * _outside(rounded)


def _weight_gradient_with_error(rounded, grid, upstream, pull):
    return _weight_gradient(rounded, grid, upstream) - pull * (rounded.levels - rounded.weights)


def _step_gradient(rounded, grid, upstream):
    # Without the division by the step, which is done once after summing: `q - w` for weights inside
    # the range, `q` for those outside.
    inside = rounded.weights - rounded.weights * _outside(rounded)
    return upstream * (rounded.levels - inside)


def _step_gradient_with_error(rounded, grid, upstream, pull):
    of_error = pull * (rounded.levels - rounded.weights) * rounded.levels
    return _step_gradient(rounded, grid, upstream) + of_error


def _offset_gradient(rounded, grid, upstream):
    return grid.step * upstream * _outside(rounded)


def _max_code_gradient(rounded, grid, upstream):
    above = tf.clip_by_value(rounded.excess, 0.0, 1.0)
    return grid.step * upstream * above


# Two ways to evaluate these functions, with the same methods: `each` gives the result for each
# weight, `summed` the sums in the shape of a tensor that broadcasts against the kernel, and `after`
# orders two results.


def is_compiled(kernel):
    """Whether a kernel has so many weights that XLA compiles its rounding."""
    return (kernel.shape.num_elements() or 0) >= COMPILED_SIZE  # None if a size is not fixed


def _passes(kernel, grid):
    return _CompiledLoops(kernel, grid) if is_compiled(kernel) else _TensorFlowOps(kernel, grid)


class _TensorFlowOps:
    """Runs operation by operation; the backward pass reuses the levels of the forward pass."""

    def __init__(self, kernel, grid, rounded=None):
        self.rounded = Rounded(kernel, *(rounded or levels_and_excess(kernel, grid)))
        self.grid = grid

    def after(self, earlier, tensor):
        return tensor  # small kernels need little memory in any order

    def each(self, function, *others, dtype="float32"):
        return _in_float32(function, dtype)(self.rounded, self.grid, *others)

    def summed(self, function, shape, *others):
        return _sum_to(self.each(function, *others), shape)


class _CompiledLoops:
    """Runs compiled loops. Each rounds the kernel again, so that no levels are kept in memory."""

    def __init__(self, kernel, grid):
        self.kernel, self.grid = kernel, grid

    def after(self, earlier, tensor):
        """A tensor that is read only after another is known, so that shared inputs are freed."""
        with tf.control_dependencies([earlier]):
            return tf.identity(tensor)

    def each(self, function, *others, dtype="float32"):
        return _compiled(function, dtype)(self.kernel, self.grid, *others)

    def summed(self, function, shape, *others):
        rank = self.kernel.shape.rank
        shapes = [shape, *(each.shape for each in self.grid)]
        shapes = [(*[1] * (rank - len(each)), *each) for each in shapes]
        # The leading axes along which neither the sums nor the grid vary are merged to rows, so
        # that one loop serves kernels of any rank.
        varying = [axis for axis in range(rank) if any(each[axis] > 1 for each in shapes)]
        shared = varying[0] if varying else rank
        shape_of_rows = -1, *self.kernel.shape[shared:]
        shape_of_sums, *shapes_of_grid = [each[shared:] for each in shapes]
        kernel, *others = [
            tf.reshape(each, shape_of_rows) if each.shape.rank else each
            for each in map(tf.convert_to_tensor, (self.kernel, *others))
        ]
        grid = Grid(*map(tf.reshape, self.grid, shapes_of_grid))
        sums, *rest = _compiled_sums(function)(kernel, grid, *others)
        # An eighth of a very large kernel is still large, so it is folded once more.
        if sums.shape.num_elements() >= COMPILED_SIZE and sums.shape[0] >= PARTS:
            sums, *more = _compiled_fold(sums)
            rest += more
        one_row = tf.TensorShape((1, *shape_of_sums))
        return tf.reshape(tf.add_n([_sum_to(each, one_row) for each in (sums, *rest)]), shape)


def _in_float32(function, dtype="float32"):
    """The function with gradients of any precision cast to float32, and its result to `dtype`."""

    def cast(rounded, grid, *others):
        others = [tf.cast(each, tf.float32) for each in others]
        return tf.cast(function(rounded, grid, *others), dtype)

    return cast


# Cached, because each `tf.function` compiles for itself; a network has many kernels of one shape.
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
    """`_fold` compiled separately: XLA would fuse it with the previous fold, at great cost."""
    return _fold(lambda part: part, rows)


def _fold(function, *tensors):
    """Adds up a function of rows over equal parts of them; the remaining rows stay separate.

    Args:
        function: Function of parts of the tensors.
        *tensors: Tensors with the same number of rows, and scalars.

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
    """Sums values over the axes along which a tensor of a given shape is broadcast."""
    if not shape.rank:
        return tf.reduce_sum(values)
    axes = [axis for axis, size in enumerate(shape) if size == 1]
    return tf.reduce_sum(values, axes, keepdims=True)
