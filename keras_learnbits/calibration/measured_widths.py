"""The tensors whose bit-widths are allocated, with the change of the outputs at each width."""

import numpy as np

from keras_learnbits.calibration.measuring import loss_table, set_width
from keras_learnbits.layers.discovery import quantized_kernels


class MeasuredWidths:
    """Measures and sets the bit-widths of a model's kernels, and of its activations if given.

    Args:
        model: Model with learned-bit layers.
        examples: Structure of arrays, the inputs that widths are measured on.
        ranges: `ActivationRanges` at all widths, of the activations to allocate; or None.

    Attributes:
        tensors: List of `QuantizedTensor`, kernels first.
    """

    def __init__(self, model, examples, ranges=None):
        self._model = model
        self._examples = examples
        self._ranges = ranges
        self._kernels = quantized_kernels(model)
        self.tensors = self._kernels + (ranges.activations if ranges else [])

    def loss_table(self, reference, distance, progress):
        """Distances of the outputs with one tensor at each width, as `measuring.loss_table` has.

        Args:
            reference: Structure of arrays, outputs of the float model for the examples.
            distance: `OutputDistance`.
            progress: Function without arguments, called after each tensor.

        Returns:
            NumPy array of shape `(tensors, 16)`.
        """
        losses = loss_table(self._model, self._examples, reference, distance, progress)
        if len(self.tensors) > len(self._kernels):
            of_activations = self._ranges.loss_table(reference, distance, progress)
            losses = np.concatenate([losses, of_activations])
        return losses

    def set(self, widths):
        """Sets bit-widths, with the scales and ranges that fit them.

        Args:
            widths: Dictionary of `QuantizedTensor` to integer.
        """
        for tensor, bits in widths.items():
            (set_width if tensor in self._kernels else self._ranges.set)(tensor, bits)
