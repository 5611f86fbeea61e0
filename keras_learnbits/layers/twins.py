"""Which Keras layers have kernels to quantize, and their learned-bit twins."""

import keras

from keras_learnbits.layers import convolutional, core
from keras_learnbits.layers.base import OwnsBits, QuantizedWeight, keras_twin

LEARNED_BIT_LAYERS = (
    core.LearnedBitDense,
    core.LearnedBitEinsumDense,
    core.LearnedBitEmbedding,
    convolutional.LearnedBitConv1D,
    convolutional.LearnedBitConv2D,
    convolutional.LearnedBitConv3D,
    convolutional.LearnedBitConv1DTranspose,
    convolutional.LearnedBitConv2DTranspose,
    convolutional.LearnedBitConv3DTranspose,
    convolutional.LearnedBitDepthwiseConv1D,
    convolutional.LearnedBitDepthwiseConv2D,
    convolutional.LearnedBitSeparableConv1D,
    convolutional.LearnedBitSeparableConv2D,
)
TWINS = {keras_twin(layer): layer for layer in LEARNED_BIT_LAYERS}
CELLS = (keras.layers.LSTMCell, keras.layers.GRUCell, keras.layers.SimpleRNNCell)
PER_UNIT = QuantizedWeight(output_axes=(-1,))
# Dictionary of each Keras layer with kernels to the names of these weights and their output axes.
KERNELS = {
    **{layer: twin.quantized_weights for layer, twin in TWINS.items()},
    **{cell: {"kernel": PER_UNIT, "recurrent_kernel": PER_UNIT} for cell in CELLS},
}


def kernels_of(layer):
    """The kernels of a Keras layer, without those of layers inside.

    Returns:
        Dictionary of weight name to `QuantizedWeight`; empty if the layer has no kernels, or
        quantizes them itself.

    Examples:
        >>> list(kernels_of(keras.layers.GRUCell(3)))
        ['kernel', 'recurrent_kernel']
    """
    if isinstance(layer, OwnsBits):
        return {}
    # A subclass of a Keras layer has its kernels, even if it has no twin.
    kernels = next((KERNELS[base] for base in type(layer).__mro__ if base in KERNELS), {})
    # `ReversibleEmbedding` extends `Embedding`, and has a second kernel unless it is tied.
    if isinstance(layer, keras.layers.ReversibleEmbedding) and not layer.tie_weights:
        return {**kernels, "reverse_embeddings": PER_UNIT}
    return kernels
