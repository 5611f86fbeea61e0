"""Keras callbacks for training with learned bits."""

from keras_learnbits.allocation.targets import SizeTarget, Target
from keras_learnbits.callbacks.bit_budget import BitBudget
from keras_learnbits.callbacks.bit_logger import BitLogger
from keras_learnbits.callbacks.collapse_guard import CollapseGuard
from keras_learnbits.callbacks.freeze_bits import FreezeBits

__all__ = ["BitBudget", "BitLogger", "CollapseGuard", "FreezeBits", "SizeTarget", "Target"]
