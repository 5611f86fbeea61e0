"""Estimators of how the loss changes with each bit-width; the sign moves the bit-width."""

import keras

from keras_learnbits.arguments import choose
from keras_learnbits.estimators.base import BitGradient, BitStep
from keras_learnbits.estimators.derivatives import Paper, StraightThrough
from keras_learnbits.estimators.difference import Difference
from keras_learnbits.estimators.measured import Measured

BIT_GRADIENTS = {
    "straight_through": StraightThrough,
    "paper": Paper,
    "difference": Difference,
    "measured": Measured,
}


def get(bit_gradient):
    """Returns an estimator from its name, config or instance.

    Raises:
        ValueError: The argument is none of these.

    Examples:
        >>> get("measured").interval
        20
    """
    if isinstance(bit_gradient, dict):
        bit_gradient = keras.saving.deserialize_keras_object(bit_gradient)
    if isinstance(bit_gradient, BitGradient):
        return bit_gradient
    return choose(bit_gradient, BIT_GRADIENTS, "bit_gradient")()


__all__ = [
    "BIT_GRADIENTS",
    "BitGradient",
    "BitStep",
    "Difference",
    "Measured",
    "Paper",
    "StraightThrough",
    "get",
]
