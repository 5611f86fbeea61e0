"""Kernels of a model rounded so that errors are compensated, on example inputs."""

import math

import keras
import numpy as np

from keras_learnbits.calibration.compensation import Compensation
from keras_learnbits.calibration.inference import as_tensors, in_inference
from keras_learnbits.calibration.layer_inputs import (
    as_matrices,
    from_matrices,
    gram_matrices,
    has_vectors,
)
from keras_learnbits.layers.compute_scope import (
    computing_with_float_kernels,
    keeping_scales,
    observing_calls,
)

# Largest number of elements of input vectors that are in memory at the same time: 128 MB.
MOST_NUMBERS = 2**25


class KernelRounding:
    """Rounds one kernel to its grid, and compensates for the errors.

    Args:
        kernel: `QuantizedKernel` of a layer for which `has_vectors` is true.
        grams: Array of shape `(groups, fan_in, fan_in)`, the results of `gram_matrices`.
    """

    def __init__(self, kernel, grams):
        self.kernel = kernel
        self._compensations = [Compensation(gram) for gram in grams]

    def __call__(self, weights):
        """Assigns rounded weights to the kernel, with scales that fit `weights`.

        Args:
            weights: Array of the shape of the kernel.
        """
        kernel = self.kernel
        with keeping_scales():
            kernel.kernel.assign(weights)
        kernel.fit_scale()
        stored = kernel.stored()
        parts = [
            as_matrices(kernel.layer, np.broadcast_to(part, weights.shape))
            for part in (weights, stored.step, stored.offset)
        ]
        if any(np.ptp(part, axis=1).any() for part in parts[1:]):
            return  # scales differ between the inputs of one output
        rounded = [
            compensate(values, step[0], offset[0], 2**stored.bits - 1)
            for compensate, values, step, offset in zip(self._compensations, *parts, strict=True)
        ]
        rounded = from_matrices(kernel.layer, np.stack(rounded), weights.shape)
        with keeping_scales():
            kernel.kernel.assign(rounded)


def kernel_roundings(model, examples):
    """A `KernelRounding` of each kernel that permits it, for the inputs of the float model.

    Args:
        model: Model with learned-bit layers; its float kernels are used.
        examples: Structure of arrays, inputs of the model.

    Returns:
        Dictionary of `QuantizedKernel` to `KernelRounding`.
    """
    found = {}

    def observer(layer, inputs):
        if layer not in found and has_vectors(layer):
            (kernel,) = layer.quantized_kernels.values()
            found[layer] = kernel, KernelRounding(kernel, _grams(layer, inputs))

    with observing_calls(observer), computing_with_float_kernels():
        in_inference(model, as_tensors(examples))
    return dict(found.values())


def round_in_order(model, examples):
    """Rounds all kernels in the order in which the layers are called.

    The inputs of each layer are computed by the layers before it, which are already rounded.
    Kernels without a `KernelRounding` are rounded to nearest. All scales are fitted to the float
    kernels.

    Args:
        model: Model with learned-bit layers, at the bit-widths to round to.
        examples: Structure of arrays, inputs of the model.
    """
    seen = set()

    def observer(layer, inputs):
        if layer in seen:
            return
        seen.add(layer)
        if has_vectors(layer):
            (kernel,) = layer.quantized_kernels.values()
            KernelRounding(kernel, _grams(layer, inputs))(kernel.kernel.numpy())

    with observing_calls(observer):
        in_inference(model, as_tensors(examples))


def _grams(layer, inputs):
    """The Gram matrices of all examples, NumPy."""
    repeated = 1 if isinstance(layer, keras.layers.Dense) else math.prod(layer.kernel_size)
    at_once = max(MOST_NUMBERS // (repeated * math.prod(inputs.shape[1:])), 1)
    starts = range(0, inputs.shape[0], at_once)
    return sum(gram_matrices(layer, inputs[start : start + at_once]).numpy() for start in starts)
