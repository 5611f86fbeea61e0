"""The float weights of layers and models, without bits and scales."""

import numpy as np

from keras_learnbits.layers.compute_scope import keeping_scales
from keras_learnbits.layers.discovery import quantized_kernels, quantized_tensor_of


def float_weights(layer):
    """Weights of a layer or model without bit-widths and scales, in order."""
    return [v for v in layer.weights if quantized_tensor_of(v) is None]


def assign_all(variables, values):
    """Assigns values to variables, in order; there must be as many values as variables."""
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


class TakesFloatWeights:
    """A layer or model whose `set_weights` also accepts float weights alone.

    It goes before the Keras class.
    """

    def set_weights(self, weights):
        """Sets all weights, or only the float ones, e.g. those of the Keras layer or model.

        With float weights the scales are fitted to the new kernels, and bit-widths do not change,
        as with `warm_start`.

        Raises:
            ValueError: The number of weights or their shapes are wrong.
        """
        floats = float_weights(self)
        if len(weights) != len(floats) or len(floats) == len(self.weights):
            with keeping_scales():
                super().set_weights(weights)
            return
        shapes, given = [tuple(v.shape) for v in floats], [np.shape(value) for value in weights]
        if shapes != given:
            raise ValueError(
                "`set_weights` needs weights with the shapes of the present ones. "
                f"Received: shapes {given} for {shapes} in {self.name!r}"
            )
        with keeping_scales():
            assign_all(floats, weights)
        for kernel in quantized_kernels(self):
            kernel.fit_scale()
