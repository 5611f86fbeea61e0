"""Keras models that learn how many bits each layer's weights need."""

from keras_learnbits.callbacks import BitLogger, FreezeBits
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
from keras_learnbits.model import LearnedBitModel, LearnedBitSequential
from keras_learnbits.optimizers import SignSGD
from keras_learnbits.quantizers import LearnedScaleQuantizer, MinMaxQuantizer
from keras_learnbits.report import bit_table

__version__ = "0.1.0"

__all__ = [
    "BitLogger",
    "FreezeBits",
    "LearnedBitConv1D",
    "LearnedBitConv1DTranspose",
    "LearnedBitConv2D",
    "LearnedBitConv2DTranspose",
    "LearnedBitConv3D",
    "LearnedBitConv3DTranspose",
    "LearnedBitDense",
    "LearnedBitDepthwiseConv1D",
    "LearnedBitDepthwiseConv2D",
    "LearnedBitEinsumDense",
    "LearnedBitEmbedding",
    "LearnedBitModel",
    "LearnedBitSeparableConv1D",
    "LearnedBitSeparableConv2D",
    "LearnedBitSequential",
    "LearnedScaleQuantizer",
    "MinMaxQuantizer",
    "SignSGD",
    "bit_table",
]
