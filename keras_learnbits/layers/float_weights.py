"""The float weights of layers and models, without bits and scales."""

import numpy as np

from keras_learnbits.layers.compute_scope import keeping_scales
from keras_learnbits.layers.discovery import quantized_kernels, quantized_tensor_of


def float_weights(layer):
    """Weights of a layer or model without bits and scales, in order."""
    return [v for v in layer.weights if quantized_tensor_of(v) is None]


def assign_all(variables, values):
    """Assigns as many values to variables, in order."""
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


class TakesFloatWeights:
    """A layer or model whose `set_weights` takes float weights, too. Goes before Keras's class."""

    def set_weights(self, weights):
        """Sets all weights; or only the float ones, as of the Keras layer or model, in order.

        With float ones scales are fitted to the new kernels, and bits stay, as with `warm_start`.

        Raises:
            ValueError: Numbers or shapes of the weights are others.
        """
        floats = float_weights(self)
        if len(weights) != len(floats) or len(floats) == len(self.weights):
            with keeping_scales():
                super().set_weights(weights)
            return
        shapes, given = [tuple(v.shape) for v in floats], [np.shape(value) for value in weights]
        if shapes != given:
            raise ValueError(
                "`set_weights` takes weights of the shapes that there are. "
                f"Received: shapes {given} for {shapes} in {self.name!r}"
            )
        with keeping_scales():
            assign_all(floats, weights)
        for kernel in quantized_kernels(self):
            kernel.fit_scale()
