"""Mappings of kernels to levels: `LearnedScaleQuantizer` (default) and `MinMaxQuantizer`.

A quantizer defines the grid that a kernel is rounded to at a bit-width. Training (float levels
with gradients) and export (integer codes) use the same grid, so they cannot disagree.
"""

import functools
import math

import keras
import tensorflow as tf

from keras_learnbits.arguments import choose
from keras_learnbits.numerics import grids, rounding, scales
from keras_learnbits.serialization import register


class Quantizer:
    """Base class: maps a kernel and a bit-width to a grid of `2**bits` levels.

    A subclass defines `grid`. If it has trained scales, it also defines `scale_shape`; the scales
    are the exponentials of `log_scale`. Register it with
    `keras.saving.register_keras_serializable`, and return the arguments of its constructor from
    `get_config`. `docs/extending.md` has an example.

    Attributes:
        fixed_range: Whether offset and highest code of the grids have gradients with respect to
            the bit-width only. False by default.
        fixed_step: Whether the step has gradients with respect to the bit-width only. False by
            default.
        is_mid_rise: Whether 0 lies half-way between two levels of each grid, so that files need no
            offsets. False by default.
        power_of_two: Whether steps are powers of two. Layers then compute with biases in fixed
            point. False by default.
    """

    power_of_two = False
    fixed_range = False
    fixed_step = False
    is_mid_rise = False

    def scale_shape(self, kernel_shape, output_axes):
        """Shape of the trained scales, which broadcasts against the kernel's; None without scales.

        Args:
            kernel_shape: Tuple of integers.
            output_axes: Axes of the kernel that index the layer's output channels.
        """
        return None

    def grid(self, kernel, bits, log_scale=None):
        """The grid for a kernel.

        Args:
            kernel: Float32 tensor.
            bits: Float32 scalar, the latent bit-width; the nearest integer is used
                (`keras_learnbits.numerics.grids.max_code`).
            log_scale: Float32 tensor, the natural logarithm of the scales, or None.

        Returns:
            `keras_learnbits.numerics.grids.Grid`, differentiable with respect to `bits` and
            `log_scale`.
        """
        raise NotImplementedError

    def constant_grid(self, kernel, bits, log_scale=None):
        """`grid` with a constant bit-width; a subclass may have a cheaper way to compute it."""
        return self.grid(kernel, tf.stop_gradient(bits), log_scale)

    def log_step_slope(self, bits):
        """Derivative of the logarithm of the step with respect to the bits.

        By default `-ln 2`: one more bit halves the step.
        """
        return tf.constant(-math.log(2.0))

    def initial_log_scale(self, kernel, scale_shape):
        """Logarithm of the initial scales, by default of the root mean square of the weights.

        Args:
            kernel: Tensor, the float kernel.
            scale_shape: Result of `scale_shape` for the kernel.

        Returns:
            Float32 tensor of shape `scale_shape`.
        """
        return scales.log_root_mean_square(kernel, scale_shape)

    def fitted_log_scale(self, kernel, bits, scale_shape):
        """Logarithm of the scales with the least squared error at a bit-width.

        It suits trained weights of any distribution. Each scale is searched between half and twice
        the root mean square, or further if the largest weight would be clipped.

        Args:
            kernel: Tensor, the float kernel.
            bits: Float32 scalar, the bit-width in bits.
            scale_shape: Result of `scale_shape` for the kernel.

        Returns:
            Float32 tensor of shape `scale_shape`.
        """
        kernel = tf.cast(kernel, tf.float32)
        start = self.initial_log_scale(kernel, scale_shape)
        low, reach = scales.search_range(kernel, start, self._half_range(kernel, bits, start))
        return self._searched(kernel, bits, start, low, reach)

    def _half_range(self, kernel, bits, log_scale):
        """Magnitude of the outermost level of the grid."""
        step, offset, max_code = self.constant_grid(kernel, bits, log_scale)
        return step * tf.maximum(tf.abs(offset), tf.abs(offset + max_code))

    def _searched(self, kernel, bits, start, low, reach):
        """Result of `scales.search` for the squared error of a kernel."""

        def error_at(log_scale):
            grid = self.constant_grid(kernel, bits, log_scale)
            return rounding.squared_error(kernel, grid, start.shape)

        return scales.search(error_at, start, low, reach)

    def quantize(self, kernel, bits, log_scale=None):
        """The kernel rounded to its grid, float32, with straight-through gradients."""
        return rounding.fake_quantize(kernel, self.grid(kernel, bits, log_scale))

    def encode(self, kernel, bits, log_scale=None):
        """Integer codes (int32) of the kernel and their grid: what a file stores."""
        grid = self.constant_grid(kernel, bits, log_scale)
        return tf.cast(grids.encode(kernel, grid), tf.int32), grid

    def quantize_with_error(self, kernel, bits, log_scale=None, dtype="float32", by_bits=True):
        """The result of `quantize`, in `dtype`, with its squared error and its squared norm.

        Args:
            kernel: Float32 tensor.
            bits: Float32 scalar, the latent bit-width; the nearest integer is used.
            log_scale: Float32 tensor, the natural logarithm of the scales, or None.
            dtype: Name of the dtype of the quantized kernel.
            by_bits: Whether the results get gradients with respect to the bit-width.

        Returns:
            The quantized kernel; `sum (q - w)**2`, whose derivative with respect to the bit-width
            is the linearized one; and `sum w**2`, a constant for gradients.
        """
        grid = self.constant_grid(kernel, bits, log_scale)
        fixed = {"fixed_range": self.fixed_range, "fixed_step": self.fixed_step}
        if not by_bits:
            return rounding.quantize_with_error(kernel, grid, dtype=dtype, **fixed)
        # Gradients with respect to kernel and scales are those of `grid`, those with respect to the
        # bit-width are those of this second grid.
        scale = None if log_scale is None else tf.stop_gradient(log_scale)
        by_bits = self.grid(tf.stop_gradient(kernel), bits, scale)
        quantized, error, norm = rounding.quantize_with_error(kernel, grid, by_bits, dtype, **fixed)
        return quantized, grids.with_error_slope(error, bits, self.log_step_slope(bits)), norm

    def squared_error(self, kernel, bits, log_scale=None):
        """`sum (q - w)**2` of the kernel rounded to its grid, a constant for gradients."""
        return rounding.squared_error(kernel, self.constant_grid(kernel, bits, log_scale))

    def get_config(self):
        return {}

    @classmethod
    def from_config(cls, config):
        return cls(**config)

    def __eq__(self, other):
        return type(self) is type(other) and self.get_config() == other.get_config()

    def __repr__(self):
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.get_config().items())
        return f"{type(self).__name__}({arguments})"

    def __hash__(self):
        return hash(type(self))


@register
class LearnedScaleQuantizer(Quantizer):
    """Symmetric mid-rise grid of `2**bits` levels with trained scales.

    Levels are half-integers times a step: at 2 bits `-1.5, -0.5, 0.5, 1.5`. The step is
    `exp(log_scale)` times the best step for unit Gaussian weights, so that the range still fits
    when the bit-width changes. Each scale starts at the root mean square of the weights that share
    it, and is then trained.

    Args:
        per_channel: Whether there is one scale per output channel (32 bits each in a packed file)
            or one scale for the whole kernel.
        power_of_two: Whether steps are powers of two, by which hardware multiplies with shifts.
            Scales are still trained; each step is the nearest power of two.

    Examples:
        >>> quantizer = LearnedScaleQuantizer()
        >>> kernel = tf.constant([[0.9], [-1.1]])
        >>> print(quantizer.quantize(kernel, tf.constant(1.0), tf.zeros((1, 1))).numpy().round(3))
        [[ 0.798]
         [-0.798]]
    """

    fixed_range = True
    is_mid_rise = True

    def __init__(self, per_channel=True, power_of_two=False):
        self.per_channel = per_channel
        self.power_of_two = power_of_two

    def scale_shape(self, kernel_shape, output_axes):
        rank = len(kernel_shape)
        kept = {axis % rank for axis in output_axes} if self.per_channel else set()
        return tuple(size if axis in kept else 1 for axis, size in enumerate(kernel_shape))

    def _half_range(self, kernel, bits, log_scale):
        step, max_code = grids.gaussian_grid(bits)
        return 0.5 * max_code * step * tf.exp(log_scale)

    def _searched(self, kernel, bits, start, low, reach):
        # A subclass may have another grid, and XLA compiles large kernels one shape at a time.
        is_standard = type(self) is LearnedScaleQuantizer and not rounding.is_compiled(kernel)
        if tf.executing_eagerly() and is_standard:
            axes = scales.shared_axes(start.shape)
            search = _traced_search(kernel.shape.rank, axes, self.power_of_two)
            return search(kernel, bits, start, low, reach)
        return super()._searched(kernel, bits, start, low, reach)

    def grid(self, kernel, bits, log_scale=None):
        return self._scaled(*grids.gaussian_grid(bits), bits, log_scale)

    def constant_grid(self, kernel, bits, log_scale=None):
        if type(self).grid is not LearnedScaleQuantizer.grid:  # a subclass with another grid
            return super().constant_grid(kernel, bits, log_scale)
        return self._scaled(*grids.constant_gaussian_grid(bits), bits, log_scale)

    def _scaled(self, step, max_code, bits, log_scale):
        step = step * tf.exp(log_scale)
        if self.power_of_two:
            step = grids.power_of_two_step(step, bits, log_scale)
        return grids.Grid(step, -0.5 * max_code, max_code)

    def log_step_slope(self, bits):
        return grids.gaussian_log_step_slope(bits)

    def get_config(self):
        config = {"per_channel": self.per_channel}
        # Left out by default, so that earlier versions of this library read the configuration.
        return {**config, "power_of_two": True} if self.power_of_two else config


@functools.cache
def _traced_search(rank, axes, power_of_two):
    """A `tf.function` that fits the scales of small kernels with a given number of axes.

    It is traced once per process, for kernels of any size. In eager mode TensorFlow would dispatch
    the operations of each candidate one by one.

    Args:
        rank: Number of axes of the kernels.
        axes: Axes along which weights share a scale, a tuple of integers.
        power_of_two: Whether steps are powers of two.
    """
    quantizer = LearnedScaleQuantizer(power_of_two=power_of_two)
    kernel = tf.TensorSpec([None] * rank)
    scales = tf.TensorSpec([1 if axis in axes else None for axis in range(rank)])
    signature = kernel, tf.TensorSpec([]), scales, scales, scales
    return tf.function(quantizer._searched, signature, autograph=False)


class ActivationQuantizer(LearnedScaleQuantizer):
    """Grid of `2**bits` levels, one of them 0, with a trained scale, for activations.

    Levels are integers times the step: `-2**(bits - 1) .. 2**(bits - 1) - 1` if signed, otherwise
    `0 .. 2**bits - 1` with half the step. At the same scale both have the same highest level.

    Args:
        signed: Float32 scalar tensor, 1.0 or 0.0.
        power_of_two: Boolean scalar tensor, whether the step is a power of two.

    Examples:
        >>> quantizer = ActivationQuantizer(tf.constant(0.0))
        >>> values = tf.constant([-1.0, 0.3, 0.8, 9.0])
        >>> print(quantizer.quantize(values, tf.constant(2.0), tf.constant(0.0)).numpy().round(3))
        [0.    0.498 0.996 1.494]
    """

    is_mid_rise = False

    def __init__(self, signed, power_of_two=False):
        super().__init__(per_channel=False, power_of_two=power_of_two)
        self.signed = signed

    def quantize(self, kernel, bits, log_scale=None, rounded=None):
        """The activations rounded to their grid, float32, with straight-through gradients.

        Args:
            kernel: Float32 tensor, the activations.
            bits: Float32 scalar, the latent bit-width; the nearest integer is used.
            log_scale: Float32 scalar, the natural logarithm of the scale.
            rounded: Result of the method `rounded`, if it is known already.
        """
        step, kernel, unit = self._in_steps(kernel, bits, log_scale)
        return step * rounding.fake_quantize(kernel, unit, rounded)

    def rounded(self, kernel, bits, log_scale):
        """`keras_learnbits.numerics.rounding.levels_and_excess`, in units of the step."""
        _, kernel, unit = self._in_steps(kernel, bits, log_scale)
        # The offset is an integer, so it need not be subtracted first as for kernels: near a half
        # that would round values of 24 bits, and a circuit would not compute the same codes.
        nearest = tf.floor(kernel + 0.5)
        lowest = tf.where(self.signed > 0, unit.offset, 0.0)  # not -0.0
        levels = tf.clip_by_value(nearest, lowest, lowest + unit.max_code)
        return levels, nearest - levels

    def _in_steps(self, kernel, bits, log_scale):
        """The step, and kernel and grid divided by it."""
        # Multiplies by the reciprocal, because `to_keras` and exported files do: their step is a
        # constant, and TensorFlow replaces division by a constant with such a product.
        step, offset, max_code = self.grid(kernel, bits, log_scale)
        return step, kernel * (1.0 / step), grids.Grid(tf.ones_like(step), offset, max_code)

    def _scaled(self, step, max_code, bits, log_scale):
        step = step * (0.5 * (1.0 + self.signed) * tf.exp(log_scale))
        power = grids.power_of_two_step(step, bits, log_scale, halved=self.signed == 0)
        step = tf.where(self.power_of_two, power, step)
        return grids.Grid(step, -0.5 * self.signed * (max_code + 1.0), max_code)


@register
class MinMaxQuantizer(Quantizer):
    """The published method's affine grid on `[min W, max W]`, computed again for each use.

    The step is `(max W - min W) / (2**bits - 1)`, so that codes fit in `bits` bits. The paper
    prints `/ 2**bits`, which would give `2**bits + 1` levels.

    Source: Raghavan et al., "BitNet: Bit-Regularized Deep Neural Networks", arXiv 1708.04788.

    Examples:
        >>> quantizer = MinMaxQuantizer()
        >>> quantizer.quantize(tf.constant([0.0, 0.9, 3.0]), tf.constant(2.0)).numpy().tolist()
        [0.0, 1.0, 3.0]
    """

    fixed_range = fixed_step = True

    def grid(self, kernel, bits, log_scale=None):
        low = tf.stop_gradient(tf.reduce_min(kernel))
        high = tf.stop_gradient(tf.reduce_max(kernel))
        max_code = grids.max_code(bits)
        # The range of a constant kernel is empty; any grid that contains the constant is exact.
        magnitude = tf.where(tf.equal(low, 0.0), 1.0, tf.abs(low))
        # Each end is divided first, because the difference of two large weights may overflow.
        step = tf.where(high > low, high / max_code - low / max_code, magnitude)
        return grids.Grid(step, low / step, max_code)

    def log_step_slope(self, bits):
        levels = 2.0 ** grids.integer_bits(bits)
        return -math.log(2.0) * levels / (levels - 1.0)


QUANTIZERS = {"learned_scale": LearnedScaleQuantizer, "min_max": MinMaxQuantizer}


def get(quantizer):
    """Returns a quantizer from its name ("learned_scale", "min_max"), config or instance.

    Raises:
        ValueError: The argument is none of these.

    Examples:
        >>> get("min_max") == MinMaxQuantizer()
        True
    """
    if isinstance(quantizer, dict):
        quantizer = keras.saving.deserialize_keras_object(quantizer)
    if isinstance(quantizer, Quantizer):
        return quantizer
    return choose(quantizer, QUANTIZERS, "kernel_quantizer")()


def serialize(quantizer):
    """The config from which `get` recreates the quantizer."""
    return keras.saving.serialize_keras_object(quantizer)
