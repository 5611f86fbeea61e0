"""Keras models that learn how many bits each layer's weights need."""

import importlib
import inspect
import pathlib
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
    "export_hls4ml",
    "export_litert",
    "export_onnx",
    "export_qonnx",
    "fold_batch_norm",
    "load_packed",
    "load_packed_model",
    "probe_bits",
    "quantize",
    "save_packed",
    "to_fixed_point",
    "to_keras",
    "to_learned_bits",
    "warm_start",
]


def _runs_a_module():
    """Whether a command imports this package: `python -m keras_learnbits...`, `keras_learnbits`.

    Python imports a package before the modules in it, so `python -m
    keras_learnbits.export.packed FILE`, which needs NumPy only, would wait for TensorFlow. In this
    case names are imported when they are first used. In all other cases everything is imported at
    once, because importing registers the classes that `keras.models.load_model` looks up, and a
    program may call nothing but `load_model`.
    """
    # `python -m` runs the module `runpy`: then the innermost caller outside of `importlib`.
    # https://docs.python.org/3/library/runpy.html
    frame = inspect.currentframe()
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name != __name__ and "importlib" not in name:
            return name == "runpy" or (name == "__main__" and _is_console_script(frame))
        frame = frame.f_back
    return False


def _is_console_script(frame):
    """Whether a frame is in the script `keras_learnbits` that pip installs."""
    path = frame.f_globals.get("__file__") or ""
    return pathlib.Path(path).stem == "keras_learnbits"


if TYPE_CHECKING or not _runs_a_module():
    from keras_learnbits.callbacks.bit_budget import BitBudget
    from keras_learnbits.callbacks.bit_logger import BitLogger
    from keras_learnbits.callbacks.collapse_guard import CollapseGuard
    from keras_learnbits.callbacks.freeze_bits import FreezeBits
    from keras_learnbits.conversion.folding import fold_batch_norm
    from keras_learnbits.conversion.to_keras import to_keras
    from keras_learnbits.conversion.to_learned_bits import to_learned_bits
    from keras_learnbits.conversion.warm_start import warm_start
    from keras_learnbits.export.fixed_point import to_fixed_point
    from keras_learnbits.export.hls4ml import export_hls4ml
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
    from keras_learnbits.quantization.quantize import quantize
    from keras_learnbits.quantizers import LearnedScaleQuantizer, MinMaxQuantizer
    from keras_learnbits.training.distillation import LearnedBitDistiller
    from keras_learnbits.training.model import LearnedBitModel, LearnedBitSequential
    from keras_learnbits.training.sign_sgd import SignSGD
else:

    def __getattr__(name):
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        # The caller of this reload is not `runpy`, so it imports everything.
        importlib.reload(sys.modules[__name__])
        return globals()[name]

    def __dir__():
        return sorted({*globals(), *__all__})
