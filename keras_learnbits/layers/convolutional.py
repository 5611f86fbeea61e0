"""Learned-bit twins of Keras's convolutions.

They take the arguments of the Keras layer, and `bits`, `min_bits`, `max_bits` and
`kernel_quantizer` (see `LearnedBitMixin`).
"""

import keras

from keras_learnbits.layers.base import LearnedBitMixin, QuantizedWeight
from keras_learnbits.serialization import register


@register
class LearnedBitConv1D(LearnedBitMixin, keras.layers.Conv1D):
    """`keras.layers.Conv1D` with a quantized kernel, a bit-width, and a scale per filter.

    Examples:
        >>> LearnedBitConv1D(4, 3)(keras.ops.ones((2, 8, 3))).shape
        TensorShape([2, 6, 4])
    """

    kernel = QuantizedWeight(output_axes=(-1,))


@register
class LearnedBitConv2D(LearnedBitMixin, keras.layers.Conv2D):
    """`keras.layers.Conv2D` with a quantized kernel, a bit-width, and a scale per filter.

    Examples:
        >>> LearnedBitConv2D(4, 3)(keras.ops.ones((2, 8, 8, 3))).shape
        TensorShape([2, 6, 6, 4])
    """

    kernel = QuantizedWeight(output_axes=(-1,))


@register
class LearnedBitConv3D(LearnedBitMixin, keras.layers.Conv3D):
    """`keras.layers.Conv3D` with a quantized kernel, a bit-width, and a scale per filter.

    Examples:
        >>> LearnedBitConv3D(4, 3)(keras.ops.ones((2, 8, 8, 8, 3))).shape
        TensorShape([2, 6, 6, 6, 4])
    """

    kernel = QuantizedWeight(output_axes=(-1,))


# Transposed kernels have the shape `(..., filters, channels)`.


@register
class LearnedBitConv1DTranspose(LearnedBitMixin, keras.layers.Conv1DTranspose):
    """`keras.layers.Conv1DTranspose` with a quantized kernel and a trainable bit-width.

    Examples:
        >>> LearnedBitConv1DTranspose(4, 3)(keras.ops.ones((2, 8, 3))).shape
        TensorShape([2, 10, 4])
    """

    kernel = QuantizedWeight(output_axes=(-2,))


@register
class LearnedBitConv2DTranspose(LearnedBitMixin, keras.layers.Conv2DTranspose):
    """`keras.layers.Conv2DTranspose` with a quantized kernel and a trainable bit-width.

    Examples:
        >>> LearnedBitConv2DTranspose(4, 3)(keras.ops.ones((2, 8, 8, 3))).shape
        TensorShape([2, 10, 10, 4])
    """

    kernel = QuantizedWeight(output_axes=(-2,))


@register
class LearnedBitConv3DTranspose(LearnedBitMixin, keras.layers.Conv3DTranspose):
    """`keras.layers.Conv3DTranspose` with a quantized kernel and a trainable bit-width.

    Examples:
        >>> LearnedBitConv3DTranspose(4, 3)(keras.ops.ones((2, 4, 4, 4, 3))).shape
        TensorShape([2, 6, 6, 6, 4])
    """

    kernel = QuantizedWeight(output_axes=(-2,))


# Depthwise kernels have the shape `(..., channels, depth_multiplier)`; each pair of indices of the
# last two axes is one output channel.


@register
class LearnedBitDepthwiseConv1D(LearnedBitMixin, keras.layers.DepthwiseConv1D):
    """`keras.layers.DepthwiseConv1D` with a quantized kernel and a trainable bit-width.

    Examples:
        >>> LearnedBitDepthwiseConv1D(3)(keras.ops.ones((2, 8, 3))).shape
        TensorShape([2, 6, 3])
    """

    kernel = QuantizedWeight(output_axes=(-2, -1))


@register
class LearnedBitDepthwiseConv2D(LearnedBitMixin, keras.layers.DepthwiseConv2D):
    """`keras.layers.DepthwiseConv2D` with a quantized kernel and a trainable bit-width.

    Examples:
        >>> LearnedBitDepthwiseConv2D(3)(keras.ops.ones((2, 8, 8, 3))).shape
        TensorShape([2, 6, 6, 3])
    """

    kernel = QuantizedWeight(output_axes=(-2, -1))


@register
class LearnedBitSeparableConv1D(LearnedBitMixin, keras.layers.SeparableConv1D):
    """`keras.layers.SeparableConv1D` with two quantized kernels, each with its own bit-width.

    Examples:
        >>> LearnedBitSeparableConv1D(4, 3)(keras.ops.ones((2, 8, 3))).shape
        TensorShape([2, 6, 4])
    """

    depthwise_kernel = QuantizedWeight(output_axes=(-2, -1))
    pointwise_kernel = QuantizedWeight(output_axes=(-1,))


@register
class LearnedBitSeparableConv2D(LearnedBitMixin, keras.layers.SeparableConv2D):
    """`keras.layers.SeparableConv2D` with two quantized kernels, each with its own bit-width.

    Examples:
        >>> layer = LearnedBitSeparableConv2D(4, 3, bits=3)
        >>> layer(keras.ops.ones((2, 8, 8, 3))).shape
        TensorShape([2, 6, 6, 4])
        >>> [float(bits) for bits in layer.bits]
        [3.0, 3.0]
    """

    depthwise_kernel = QuantizedWeight(output_axes=(-2, -1))
    pointwise_kernel = QuantizedWeight(output_axes=(-1,))
