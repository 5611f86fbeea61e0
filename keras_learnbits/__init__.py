"""Keras models that learn how many bits each layer's weights need."""

import importlib
import inspect
import sys
from typing import TYPE_CHECKING

from keras_learnbits._version import __version__ as __version__

__all__ = [
    "BitBudget",
    "BitLogger",
    "CollapseGuard",
    "FreezeBits",
    "LearnedBitActivation",
    "LearnedBitConv1D",
    "LearnedBitConv1DTranspose",
    "LearnedBitConv2D",
    "LearnedBitConv2DTranspose",
    "LearnedBitConv3D",
    "LearnedBitConv3DTranspose",
    "LearnedBitDense",
    "LearnedBitDepthwiseConv1D",
    "LearnedBitDepthwiseConv2D",
    "LearnedBitDistiller",
    "LearnedBitEinsumDense",
    "LearnedBitEmbedding",
    "LearnedBitModel",
    "LearnedBitSeparableConv1D",
    "LearnedBitSeparableConv2D",
    "LearnedBitSequential",
    "LearnedBitWrapper",
    "LearnedScaleQuantizer",
    "MinMaxQuantizer",
    "SignSGD",
    "bit_table",
    "export_litert",
    "export_onnx",
    "export_qonnx",
    "load_packed",
    "load_packed_model",
    "probe_bits",
    "save_packed",
    "to_keras",
    "to_learned_bits",
    "warm_start",
]


def _runs_a_module():
    """Whether `python -m keras_learnbits...` imports this package, to get at a module in it.

    Importing a module imports the packages that hold it, so `python -m
    keras_learnbits.export.packed FILE`, which needs NumPy only, would wait for TensorFlow. Only
    there names are imported when they are asked for. Everywhere else this package must be imported
    as a whole: Keras looks the classes of a saved model up among those that are registered, which
    they are when their modules are imported, and `keras.models.load_model` may be all that a
    program does with them.

    `python -m` is the module `runpy`; it is then the first outside of `importlib` on the way to
    this import. https://docs.python.org/3/library/runpy.html
    """
    frame = inspect.currentframe()
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name != __name__ and "importlib" not in name:
            return name == "runpy"
        frame = frame.f_back
    return False


if TYPE_CHECKING or not _runs_a_module():
    from keras_learnbits.callbacks.bit_budget import BitBudget
    from keras_learnbits.callbacks.bit_logger import BitLogger
    from keras_learnbits.callbacks.collapse_guard import CollapseGuard
    from keras_learnbits.callbacks.freeze_bits import FreezeBits
    from keras_learnbits.conversion.to_keras import to_keras
    from keras_learnbits.conversion.to_learned_bits import to_learned_bits
    from keras_learnbits.conversion.warm_start import warm_start
    from keras_learnbits.export.litert import export_litert
    from keras_learnbits.export.onnx import export_onnx
    from keras_learnbits.export.packed import load_packed, load_packed_model, save_packed
    from keras_learnbits.export.qonnx import export_qonnx
    from keras_learnbits.inspection.bit_table import bit_table
    from keras_learnbits.inspection.probe import probe_bits
    from keras_learnbits.layers.activation import LearnedBitActivation
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
    from keras_learnbits.layers.wrapper import LearnedBitWrapper
    from keras_learnbits.quantizers import LearnedScaleQuantizer, MinMaxQuantizer
    from keras_learnbits.training.distillation import LearnedBitDistiller
    from keras_learnbits.training.model import LearnedBitModel, LearnedBitSequential
    from keras_learnbits.training.sign_sgd import SignSGD
else:

    def __getattr__(name):
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        # This time it is not `runpy` that imports.
        importlib.reload(sys.modules[__name__])
        return globals()[name]

    def __dir__():
        return sorted({*globals(), *__all__})
