"""The grids of quantized activations, and an operator by which converters recognize them."""

from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_learnbits.layers.discovery import activations_among, quantized_tensors


class ActivationGrid(NamedTuple):
    """The grid of a quantized activation.

    Attributes:
        name: Name of the `LearnedBitActivation`.
        bits: Its bit-width.
        step: Float32 number, the distance between two levels.
        signed: Whether half of its codes are negative.
    """

    name: str
    bits: int
    step: np.float32
    signed: bool

    @property
    def lowest_code(self):
        return -(2 ** (self.bits - 1)) if self.signed else 0

    @property
    def highest_code(self):
        return self.lowest_code + 2**self.bits - 1


def grid_of(activation):
    """The `ActivationGrid` of a `LearnedBitActivation`."""
    step, offset, max_code = activation.grid()
    bits = int(max_code + 1).bit_length() - 1
    return ActivationGrid(activation.name, bits, np.float32(step), bool(offset < 0))


def activation_grids(model):
    """List of the `ActivationGrid` of each `LearnedBitActivation` of a model."""
    return [grid_of(tensor.layer) for tensor in activations_among(quantized_tensors(model))]


def nearest_grid(grids, scale, is_possible):
    """The grid of a quantization that a converter has written: that of the nearest step.

    Args:
        grids: List of `ActivationGrid`, those of the model.
        scale: Step that the converter computed.
        is_possible: Function of a grid to whether its zero point is that of the quantization.
    """
    return min(filter(is_possible, grids), key=lambda grid: abs(grid.step - scale))


def fake_quantized(activation, zero_point, lowest):
    """Function of a tensor that converters recognize as a quantized activation.

    Converters derive integers from the range of its operator. So the range covers 256 integers at
    the step of the activation, which uses `2**bits` of them.

    Args:
        activation: `LearnedBitActivation` that the function replaces.
        zero_point: Function from an `ActivationGrid` to the integer that represents 0.
        lowest: Integer, the lowest of the 256.
    """
    grid = grid_of(activation)
    integers = np.array([lowest, lowest + 255]) - zero_point(grid)
    low, high = (float(grid.step * each) for each in integers)

    class FakeQuantize(keras.layers.Layer):
        def call(self, inputs):
            return tf.quantization.fake_quant_with_min_max_args(inputs, low, high)

    layer = FakeQuantize(name=activation.name, dtype="float32")
    layer.supports_masking = True
    return lambda inputs, **ignored: layer(inputs)
