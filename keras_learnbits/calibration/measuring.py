"""Measures the distances of the outputs from the float model's at each width of each layer."""

import contextlib

import keras
import numpy as np
import tensorflow as tf

from keras_learnbits.calibration.inference import as_tensors, outputs_of, rows
from keras_learnbits.calibration.rounding import kernel_roundings
from keras_learnbits.layers.compute_scope import keeping_scales
from keras_learnbits.layers.discovery import quantized_kernels
from keras_learnbits.numerics import grids

# Widths above this one are not measured: each further bit divides the squared error by four.
HIGHEST_MEASURED = 5
# Every further bit is credited with at least this distance, so that an allocation spends the
# budget.
TRACE = 1e-9
# Distance at widths at which outputs are not finite.
BROKEN = 1e6
# Number of examples that widths are measured on; fewer if inputs are large, because a model is
# called on all of them at once.
MOST_EXAMPLES = 256
MOST_NUMBERS = 2**23


def measured_rows(examples):
    """Those examples that widths are measured on: the first ones."""
    numbers = sum(each[0].size for each in keras.tree.flatten(examples))
    return rows(examples, slice(min(MOST_EXAMPLES, max(MOST_NUMBERS // numbers, 8))))


def loss_table(model, examples, reference, distance, progress):
    """Distances of the outputs with one kernel at each width, and all others at 16 bits.

    Rounding errors of different layers are nearly independent, so their squared distances add up.
    Errors are compensated (`KernelRounding`) as in the final rounding. Afterwards, also after an
    interruption, the model is unchanged.

    Args:
        model: Model with learned-bit layers.
        examples: Structure of arrays, inputs of the model.
        reference: Structure of arrays, outputs of the float model for them.
        distance: `OutputDistance`.
        progress: Function without arguments, called after each kernel.

    Returns:
        NumPy array of shape `(kernels, 16)`, in the order of `quantized_kernels`: the distance at
        1, 2, ... bits, `inf` beyond a layer's bounds. Each further bit lowers it.
    """
    kernels = quantized_kernels(model)
    inputs, reference = as_tensors(examples), as_tensors(reference)

    @tf.function(autograph=False)
    def measured():
        return distance(outputs_of(model, inputs), reference)

    table = []
    with _restoring(kernels):
        for kernel in kernels:
            set_width(kernel, grids.MAX_BITS)
        roundings = kernel_roundings(model, examples)
        for kernel in kernels:
            table.append(_row(kernel, roundings.get(kernel), measured))
            progress()
    return np.array(table)


@contextlib.contextmanager
def _restoring(kernels):
    """A scope after which kernels, bits and scales have their previous values."""
    variables = [v for k in kernels for v in (k.kernel, k.bits, k.log_scale) if v is not None]
    values = [variable.numpy() for variable in variables]
    try:
        yield
    finally:
        with keeping_scales():
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)


def _row(kernel, rounding, measured):
    """Distances at the widths of one kernel, which is then at 16 bits again.

    Args:
        kernel: `QuantizedKernel`.
        rounding: `KernelRounding`, or None.
        measured: Function without arguments that returns the distance at the present kernels.
    """
    low, high = kernel.layer.min_bits, kernel.layer.max_bits
    weights = kernel.kernel.numpy()
    distances = {}
    for bits in range(low, max(low, min(high, HIGHEST_MEASURED)) + 1):
        set_width(kernel, bits)
        if rounding is not None:
            rounding(weights)
        distances[bits] = finite(measured())
        with keeping_scales():
            kernel.kernel.assign(weights)
    set_width(kernel, grids.MAX_BITS)
    return monotone_row(distances, low, high, kernel.size)


def finite(distance):
    """A distance as a number, large where outputs are not finite."""
    return float(np.nan_to_num(distance, nan=BROKEN, posinf=BROKEN))


def monotone_row(distances, low, high, size):
    """Distances at 1, 2, ... bits that fall with each bit, shape `(16,)`.

    Args:
        distances: Dictionary of bits to the measured distance; each further bit is credited with
            three quarters of the distance.
        low: Lowest bit-width; those below have `inf`.
        high: Highest bit-width.
        size: Number of weights or values.
    """
    row = np.full(grids.MAX_BITS, np.inf)
    for bits in range(low, high + 1):
        row[bits - 1] = distances[bits] if bits in distances else row[bits - 2] / 4
    for bits in range(high - 1, low - 1, -1):
        row[bits - 1] = max(row[bits - 1], row[bits] + TRACE * size / 2**bits)
    return row


def set_width(kernel, bits):
    """Sets the bit-width of a kernel, and scales that fit it."""
    kernel.bits.assign(float(bits))
    kernel.fit_scale()
