"""The learned-bit layers."""

from keras_learnbits.layers.convolutional import (
    LearnedBitConv1D,
    LearnedBitConv1DTranspose,
    LearnedBitConv2D,
    LearnedBitConv2DTranspose,
    LearnedBitConv3D,
    LearnedBitConv3DTranspose,
    LearnedBitDepthwiseConv1D,
    LearnedBitDepthwiseConv2D,
    LearnedBitSeparableConv1D,
    LearnedBitSeparableConv2D,
)
from keras_learnbits.layers.core import (
    LearnedBitDense,
    LearnedBitEinsumDense,
    LearnedBitEmbedding,
)

__all__ = [name for name in dir() if name.startswith("LearnedBit")]
