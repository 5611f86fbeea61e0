"""Ranges of quantized activations at each bit-width, and the change of the outputs at each."""

import numpy as np
import tensorflow as tf

from keras_learnbits.calibration.inference import as_tensors, batches_of, in_inference, outputs_of
from keras_learnbits.calibration.measuring import finite, monotone_row
from keras_learnbits.layers.compute_scope import (
    calibrating_activations,
    computing_with_float_kernels,
)
from keras_learnbits.layers.discovery import activations_among, quantized_tensors

BATCH_SIZE = 32


class ActivationRanges:
    """Ranges of the quantized activations of a model, fitted to float activations.

    Trained ranges are replaced. Activations that are not trained keep their ranges.

    Args:
        model: Model with learned-bit layers.
        examples: Structure of arrays, inputs of the model.
        all_widths: Whether to fit ranges at each width that a layer may have, instead of only at
            the present one.
    """

    def __init__(self, model, examples, all_widths):
        self.model = model
        everything = activations_among(quantized_tensors(model))
        self.activations = [each for each in everything if each.trainable]
        kept = [v for each in everything if not each.trainable for v in _state(each.layer)]
        values = [variable.numpy() for variable in kept]
        self._examples = examples
        self._fits = {}
        present = [float(each.bits) for each in self.activations]
        layers = [each.layer for each in self.activations]
        low = min((layer.min_bits for layer in layers), default=0)
        high = max((layer.max_bits for layer in layers), default=-1)
        for bits in range(low, high + 1) if all_widths else ():
            self._fit([min(max(bits, each.min_bits), each.max_bits) for each in layers])
        self._fit(present)
        for variable, value in zip(kept, values, strict=True):  # the scope calibrates all layers
            variable.assign(value)

    def _fit(self, widths):
        """Fits the ranges at one width of each activation."""
        for each, bits in zip(self.activations, widths, strict=True):
            each.bits.assign(bits)
            _clear(each.layer)
        with calibrating_activations(), computing_with_float_kernels():
            for batch in batches_of(self._examples, BATCH_SIZE):
                in_inference(self.model, as_tensors(batch))
        for each in self.activations:
            values = [variable.numpy() for variable in _state(each.layer)]
            self._fits[each, int(each.integer_bits())] = values

    def set(self, activation, bits):
        """Sets the width of an activation, and the range that was fitted at this width."""
        activation.bits.assign(float(bits))
        fit = self._fits[activation, bits]
        for variable, value in zip(_state(activation.layer), fit, strict=True):
            variable.assign(value)

    def loss_table(self, reference, distance, progress):
        """Distances of the outputs with one activation at each width, and all else in float.

        Afterwards the activations are unchanged.

        Args:
            reference: Structure of arrays, outputs of the float model for the examples.
            distance: `OutputDistance`.
            progress: Function without arguments, called after each activation.

        Returns:
            NumPy array of shape `(activations, 16)`: the distance at 1, 2, ... bits, `inf` beyond a
            layer's bounds. Each further bit lowers it.
        """
        inputs, reference = as_tensors(self._examples), as_tensors(reference)

        @tf.function(autograph=False)
        def measured():
            with computing_with_float_kernels():
                return distance(outputs_of(self.model, inputs), reference)

        present = [float(each.bits) for each in self.activations]
        table = []
        try:
            for each in self.activations:
                _clear(each.layer)
            for each in self.activations:
                low, high = each.layer.min_bits, each.layer.max_bits
                distances = {}
                for bits in range(low, high + 1):
                    self.set(each, bits)
                    distances[bits] = finite(measured())
                _clear(each.layer)
                table.append(monotone_row(distances, low, high, each.size))
                progress()
        finally:
            for each, bits in zip(self.activations, present, strict=True):
                self.set(each, int(bits + 0.5))
                each.bits.assign(bits)
        return np.array(table)

    def unfitted(self):
        """Names of the activations whose input was zero for all examples."""
        return [each.layer.name for each in self.activations if not each.layer.is_fitted()]


def _state(layer):
    """The variables of a `LearnedBitActivation` that its calibration sets."""
    return layer.total_log_scale, layer.batches_seen, layer.signed, layer.trained_log_scale


def _clear(layer):
    """Makes a `LearnedBitActivation` return its input unchanged, until it is calibrated."""
    for variable in _state(layer):
        variable.assign(0.0)
