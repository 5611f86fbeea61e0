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


# Steps in a conversion differ by at least this share. Converters keep seven digits.
APART = 2.0**-16


def distinct_steps(steps):
    """Numbers near the given ones, no two of which are equal.

    Args:
        steps: List of positive numbers.

    Examples:
        >>> [f"{step:.6f}" for step in distinct_steps([0.5, 0.25, 0.5])]
        ['0.500000', '0.250000', '0.500008']
    """
    distinct, smallest = np.array(steps, "float64"), 0.0
    for index in np.argsort(distinct, kind="stable"):
        distinct[index] = max(distinct[index], smallest)
        smallest = distinct[index] * (1 + APART)
    return distinct


class ConvertedActivations:
    """The activations of a model as operators in which converters recognize a quantization.

    Converters keep the scale of a quantization, but not which activation it was, and activations
    may have equal steps, such as powers of two. So in the conversion each activation has a step
    that no other one has.

    Args:
        model: A Keras model whose activations have fitted ranges.
        zero_point: Function from an `ActivationGrid` to the integer that represents 0.
        lowest: Integer, the lowest of the 256 to which activations are mapped.

    Raises:
        ValueError: An activation has more than 8 bits.
    """

    def __init__(self, model, zero_point, lowest):
        self.zero_point = zero_point
        self.lowest = lowest
        layers = [tensor.layer for tensor in activations_among(quantized_tensors(model))]
        self.grids = [grid_of(layer) for layer in layers]
        for grid in self.grids:
            if grid.bits > 8:
                raise ValueError(
                    "`arithmetic='int8'` needs activations of at most 8 bits. Set fewer bits, or "
                    f"export in float arithmetic. Received: {grid.name!r} with {grid.bits} bits"
                )
        self._steps = distinct_steps([grid.step for grid in self.grids])
        self._indices = {id(layer): index for index, layer in enumerate(layers)}

    def grid(self, scale):
        """The `ActivationGrid` of the activation that a converter gave a scale."""
        return self.grids[np.abs(self._steps - float(scale)).argmin()]

    def twin(self, activation):
        """Function of a tensor that converters recognize as a quantized activation.

        Converters derive integers from the range of its operator. So the range covers 256 integers
        at the step of the activation, which uses `2**bits` of them.

        Args:
            activation: `LearnedBitActivation` that the function replaces.
        """
        index = self._indices[id(activation)]
        integers = np.array([self.lowest, self.lowest + 255]) - self.zero_point(self.grids[index])
        low, high = (float(self._steps[index] * each) for each in integers)

        class FakeQuantize(keras.layers.Layer):
            def call(self, inputs):
                return tf.quantization.fake_quant_with_min_max_args(inputs, low, high)

        layer = FakeQuantize(name=activation.name, dtype="float32")
        layer.supports_masking = True
        return lambda inputs, **ignored: layer(inputs)
