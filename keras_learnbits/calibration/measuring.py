"""What each layer's bits are worth: distances of the outputs at each width of each layer."""

import numpy as np
import tensorflow as tf

from keras_learnbits.calibration.inference import as_tensors, in_inference
from keras_learnbits.calibration.rounding import kernel_roundings
from keras_learnbits.layers.compute_scope import keeping_scales
from keras_learnbits.layers.discovery import quantized_kernels
from keras_learnbits.numerics import grids

# Widths above this one are not measured: each further bit divides the squared error by four.
HIGHEST_MEASURED = 5
# Distance that one more bit is always credited with, so that an allocation spends the budget.
TRACE = 1e-9


def loss_table(model, examples, reference, distance, progress):
    """Distances of the outputs with one kernel at each width, and all others at 16 bits.

    Rounding errors of different layers are nearly independent, so their squared distances add up.
    Errors are compensated (`KernelRounding`) as they will be at the end. The kernels keep their
    values, and are left at 16 bits.

    Args:
        model: Model with learned-bit layers.
        examples: Structure of arrays, inputs of the model.
        reference: Structure of arrays, outputs of the float model for them.
        distance: `OutputDistance`.
        progress: Function without arguments, called after each kernel.

    Returns:
        NumPy array of shape `(kernels, 16)`, in the order of `quantized_kernels`: the distance at
        1, 2, ... bits, `inf` beyond a layer's bounds. It always falls with the bits.
    """
    kernels = quantized_kernels(model)
    for kernel in kernels:
        set_width(kernel, grids.MAX_BITS)
    roundings = kernel_roundings(model, examples)
    inputs, reference = as_tensors(examples), as_tensors(reference)

    @tf.function
    def measured():
        return distance(in_inference(model, inputs), reference)

    rows = []
    for kernel in kernels:
        rows.append(_row(kernel, roundings.get(kernel), measured))
        progress()
    return np.array(rows)


def _row(kernel, rounding, measured):
    """Distances at the widths of one kernel, which is then at 16 bits again.

    Args:
        kernel: `QuantizedKernel`.
        rounding: `KernelRounding`, or None.
        measured: Function to the distance at the present kernels.
    """
    low, high = kernel.layer.min_bits, kernel.layer.max_bits
    weights = kernel.kernel.numpy()
    distances = {}
    for bits in range(low, max(low, min(high, HIGHEST_MEASURED)) + 1):
        set_width(kernel, bits)
        if rounding is not None:
            rounding(weights)
        distances[bits] = float(measured())
        with keeping_scales():
            kernel.kernel.assign(weights)
    set_width(kernel, grids.MAX_BITS)
    row = np.full(grids.MAX_BITS, np.inf)
    for bits in range(low, high + 1):
        row[bits - 1] = distances[bits] if bits in distances else row[bits - 2] / 4
    for bits in range(high - 1, low - 1, -1):
        row[bits - 1] = max(row[bits - 1], row[bits] + TRACE * kernel.size / 2**bits)
    return row


def set_width(kernel, bits):
    """Sets the bit-width of a kernel, and scales that fit it."""
    kernel.bits.assign(float(bits))
    kernel.fit_scale()
