"""Learned-bit twins of Keras's core layers."""

import keras

from keras_learnbits.layers.base import LearnedBitMixin, QuantizedWeight
from keras_learnbits.serialization import register


@register
class LearnedBitDense(LearnedBitMixin, keras.layers.Dense):
    """`keras.layers.Dense` with a quantized kernel and a trainable bit-width.

    Takes the arguments of `keras.layers.Dense`, and `bits`, `min_bits`, `max_bits` and
    `kernel_quantizer` (see `LearnedBitMixin`). There is one scale per unit.

    Input shape: `(batch_size, ..., input_dim)`. Output shape: `(batch_size, ..., units)`.

    Examples:
        >>> layer = LearnedBitDense(3, bits=2)
        >>> layer(keras.ops.ones((4, 5))).shape
        TensorShape([4, 3])
        >>> float(layer.bits)
        2.0
    """

    kernel = QuantizedWeight(output_axes=(-1,))


def _einsum_output_axes(layer):
    """Axes of an einsum kernel that appear in the output.

    Products are summed over all other axes, along which weights must share a scale.
    """
    inputs, output = layer.equation.replace(" ", "").split("->")
    kernel = inputs.split(",")[1]
    return tuple(axis for axis, letter in enumerate(kernel) if letter in output)


@register
class LearnedBitEinsumDense(LearnedBitMixin, keras.layers.EinsumDense):
    """`keras.layers.EinsumDense` with a quantized kernel and a trainable bit-width.

    Takes the arguments of `keras.layers.EinsumDense`, and those of `LearnedBitMixin`. There is one
    scale per index of the kernel's axes that appear in the output.

    Examples:
        >>> layer = LearnedBitEinsumDense("ab,bc->ac", output_shape=3, bias_axes="c", bits=4)
        >>> layer(keras.ops.ones((4, 5))).shape
        TensorShape([4, 3])
    """

    kernel = QuantizedWeight(output_axes=_einsum_output_axes)


@register
class LearnedBitEmbedding(LearnedBitMixin, keras.layers.Embedding):
    """`keras.layers.Embedding` with quantized embeddings and a trainable bit-width.

    Takes the arguments of `keras.layers.Embedding`, and those of `LearnedBitMixin`. There is one
    scale per output dimension, shared by all rows.

    Input shape: `(batch_size, ...)` of integers. Output shape: `(batch_size, ..., output_dim)`.

    Examples:
        >>> layer = LearnedBitEmbedding(100, 8, bits=4)
        >>> layer(keras.ops.zeros((4, 5), "int32")).shape
        TensorShape([4, 5, 8])
    """

    embeddings = QuantizedWeight(output_axes=(-1,))

    def __init__(self, *args, weights=None, **kwargs):
        super().__init__(*args, **kwargs)
        if weights is not None:
            # Keras calls `set_weights(weights)` (keras/src/layers/core/embedding.py), which would
            # need values for the bit-width and the scales, too.
            self.build()
            values = weights[0] if isinstance(weights, list) and len(weights) == 1 else weights
            self.quantized_kernels["embeddings"].kernel.assign(values)
            self.quantized_kernels["embeddings"].fit_scale()
