"""Which values a tensor of a circuit can have, layer by layer.

A circuit adds and multiplies integers. A model in float32 computes the same numbers exactly as long
as every sum is an integer of at most 24 bits times a power of two. Each rule here computes the
`Levels` of a layer's output from those of its inputs. Layers without exact sums are refused.
"""

import functools
import math
from typing import NamedTuple

import keras
import numpy as np

from keras_learnbits.conversion.input_ranges import INACTIVE
from keras_learnbits.export._activations import grid_of
from keras_learnbits.layers.activation import LearnedBitActivation
from keras_learnbits.layers.base import fixed_point_bias
from keras_learnbits.layers.convolutional import (
    LearnedBitConv1D,
    LearnedBitConv2D,
    LearnedBitDepthwiseConv1D,
    LearnedBitDepthwiseConv2D,
    LearnedBitSeparableConv1D,
    LearnedBitSeparableConv2D,
)
from keras_learnbits.layers.core import LearnedBitDense

L = keras.layers
# Integers up to this one are exact in float32.
EXACT = 2**24
CONVOLUTIONS = (LearnedBitConv1D, LearnedBitConv2D)
DEPTHWISE = (LearnedBitDepthwiseConv1D, LearnedBitDepthwiseConv2D)
SEPARABLE = (LearnedBitSeparableConv1D, LearnedBitSeparableConv2D)
ARRANGING = (L.Flatten, L.Reshape, L.Permute, L.MaxPooling1D, L.MaxPooling2D,
             L.GlobalMaxPooling1D, L.GlobalMaxPooling2D)  # fmt: skip
PADDING = (L.ZeroPadding1D, L.ZeroPadding2D)
AVERAGING = (L.AveragePooling1D, L.AveragePooling2D)
GLOBAL_AVERAGING = (L.GlobalAveragePooling1D, L.GlobalAveragePooling2D)
LINEAR, RELU = keras.activations.linear, keras.activations.relu


class Levels(NamedTuple):
    """The values of a tensor are integers times a step, up to a magnitude.

    Attributes:
        step: A power of two; a number, or an array with one per channel.
        largest: Bound of the magnitude; a number, or an array with one per channel.
    """

    step: np.ndarray
    largest: np.ndarray

    def of_all(self):
        """The same for all channels together."""
        return Levels(np.min(self.step), np.max(self.largest))


class InexactError(ValueError):
    """A layer's outputs cannot be computed exactly; the message says why and what to change."""


def output_levels(call, inputs):
    """The values that a layer's output can have.

    Args:
        call: `keras_learnbits._keras.Call` of a layer of a learned-bit model.
        inputs: List of `Levels` of its inputs, or None for those that are not quantized.

    Returns:
        `Levels`.

    Raises:
        InexactError: The output cannot be computed exactly, or circuits do not support the layer.
    """
    for kinds, rule in RULES:
        if isinstance(call.operation, kinds):
            if rule is not _activation and None in inputs:
                raise InexactError(
                    "its input is not quantized: convert the model with `activations=True`; inputs "
                    "of integers are not quantized, so cast them to floats before the model"
                )
            levels = rule(call, *inputs)
            _check_width(levels)
            return levels
    raise InexactError(_no_rule(call.operation))


def _no_rule(layer):
    if isinstance(layer, L.BatchNormalization):
        return (
            "it does not directly follow a dense layer or a convolution without an activation, so "
            "`fold_batch_norm` cannot fold it: move it there"
        )
    if isinstance(layer, (L.Dense, L.Conv1D, L.Conv2D)):
        return "its kernel is float: convert it with `to_learned_bits(..., power_of_two=True)`"
    if isinstance(layer, (L.Rescaling, L.Normalization)):
        return "apply it to the data, before the model"
    return (
        f"a {type(layer).__name__} cannot be computed exactly, or hls4ml has none. There are dense "
        "layers, convolutions along one and two axes (also depthwise and separable ones), ReLU, "
        "pooling, padding, merging and reshaping layers"
    )


def _check_width(levels):
    """Raises an `InexactError` unless float32 is exact for these values."""
    integer = np.max(levels.largest / levels.step)
    if integer > EXACT:
        raise InexactError(
            f"its sums can have {math.log2(integer):.1f} bits, and float32 is exact up to 24: use "
            "fewer bits for its kernel or for its input"
        )


def step_of(array):
    """The largest power of two that all numbers of an array are multiples of; infinite for zeros.

    Examples:
        >>> step_of(np.array([0.75, -2.0, 0.0]))
        0.25
    """
    numbers = np.asarray(array, "float64")
    mantissas, exponents = np.frexp(numbers[numbers != 0])
    integers = (mantissas * 2.0**53).astype("int64")
    lowest = np.log2(integers & -integers)
    return float(2.0 ** np.min(exponents + lowest - 53, initial=np.inf))


def _activation(call, values):
    layer = call.operation
    if not layer.is_fitted():
        raise InexactError(
            "it has no range yet, or its input was zero in all examples: call the model on "
            "training data, or remove the layer"
        )
    if not layer.power_of_two:
        raise InexactError(
            "its step is not a power of two: convert the model with "
            "`to_learned_bits(..., activations=True, power_of_two=True)`"
        )
    grid = grid_of(layer)
    step = float(grid.step)
    return Levels(step, step * max(-grid.lowest_code, grid.highest_code))


def _kernel_layer(call, values):
    """Rule of dense layers and convolutions."""
    layer = call.operation
    if getattr(layer, "data_format", "channels_last") != "channels_last":
        raise InexactError("hls4ml computes with channels last: build the model with them")
    if max(np.ravel(getattr(layer, "dilation_rate", 1))) > 1:
        raise InexactError("hls4ml has no dilated convolutions")
    if getattr(layer, "groups", 1) != 1:
        raise InexactError("hls4ml has no grouped convolutions")
    if getattr(layer, "depth_multiplier", 1) != 1:
        raise InexactError("hls4ml has depthwise convolutions with a depth multiplier of 1 only")
    _check_activation(layer.activation)
    kernels = [kernel_levels(kernel) for kernel in layer.quantized_kernels.values()]
    bias = fixed_point_bias(layer.bias).numpy() if layer.use_bias else np.zeros(1)
    for number, (kernel, levels) in enumerate(zip(layer.quantized_kernels, kernels, strict=True)):
        last = number == len(kernels) - 1
        depthwise = isinstance(layer, DEPTHWISE) or kernel == "depthwise_kernel"
        values = _summed(values, levels, bias if last else np.zeros(1), depthwise)
    return values


def _summed(values, kernel, bias, depthwise):
    """`Levels` of the sums of products with a kernel.

    Args:
        values: `Levels` of the inputs.
        kernel: Array, the quantized kernel.
        bias: Array, the bias that is added.
        depthwise: Whether the last two axes index the outputs, instead of only the last one.
    """
    values = values.of_all()
    per_output = np.abs(kernel).reshape(-1, math.prod(kernel.shape[-2 if depthwise else -1 :]))
    bias = np.broadcast_to(bias, per_output.shape[1:])
    steps = [
        min(step_of(column) * values.step, step_of(each))
        for column, each in zip(per_output.T, bias, strict=True)
    ]
    sums = Levels(
        np.where(np.isinf(steps), 1.0, steps),  # infinite for zeros
        per_output.sum(axis=0) * values.largest + np.abs(bias),
    )
    _check_width(sums)
    return sums


def kernel_levels(kernel):
    """The values of a quantized kernel, a float64 array.

    Args:
        kernel: `QuantizedKernel`.

    Raises:
        InexactError: Its steps are not powers of two.
    """
    if not kernel.quantizer.power_of_two:
        raise InexactError(
            "the steps of its kernel are not powers of two: convert the model with "
            "`to_learned_bits(..., power_of_two=True)` or `quantize(..., power_of_two=True)`"
        )
    return kernel.quantized().numpy().astype("float64")


def _check_activation(function):
    if function not in (LINEAR, RELU):
        name = getattr(function, "__name__", str(function))
        raise InexactError(
            f"its activation {name!r} is not exact in a circuit, which has ReLU. In the last layer "
            "set `layer.activation = keras.activations.linear` and export logits"
        )


def _activation_function(call, values):
    _check_activation(call.operation.activation)
    return values


def _relu(call, values):
    layer = call.operation
    plain = not layer.negative_slope and not layer.threshold
    if not plain or layer.max_value not in (None, math.inf):
        raise InexactError("hls4ml computes ReLU without slope, threshold and maximum exactly")
    return values


def _same(call, values):
    if getattr(call.operation, "data_format", "channels_last") == "channels_first":
        raise InexactError("hls4ml computes with channels last: build the model with them")
    return values.of_all()


def _average(call, values):
    values = _same(call, values)
    if call.operation.padding != "valid":
        raise InexactError("at the edges it averages fewer values: use padding='valid'")
    return _mean_of(math.prod(np.ravel(call.operation.pool_size)), values)


def _global_average(call, values):
    return _mean_of(math.prod(call.inputs[0].shape[1:-1]), _same(call, values))


def _mean_of(number, values):
    if number & (number - 1):
        raise InexactError(
            f"an average of {number} values is not a multiple of a power of two: pool over 2, 4, "
            "8, 16, ... values"
        )
    _check_width(Levels(values.step, number * values.largest))
    return Levels(values.step / number, values.largest)


def _check_pair(inputs):
    if len(inputs) > 2:
        raise InexactError("hls4ml merges two tensors: merge them in pairs")


def _added(call, *inputs):
    _check_pair(inputs)
    return Levels(_least_step(inputs), sum(each.largest for each in inputs))


def _averaged(call, *inputs):
    return _mean_of(len(inputs), _added(call, *inputs))


def _multiplied(call, *inputs):
    _check_pair(inputs)
    return Levels(
        math.prod(each.step for each in inputs), math.prod(each.largest for each in inputs)
    )


def _compared(call, *inputs):
    _check_pair(inputs)
    return Levels(_least_step(inputs), functools.reduce(np.maximum, (i.largest for i in inputs)))


def _least_step(inputs):
    return functools.reduce(np.minimum, (each.step for each in inputs))


def _joined(call, *inputs):
    return _compared(call, *(each.of_all() for each in inputs))


RULES = (
    ((LearnedBitActivation,), _activation),
    ((LearnedBitDense, *CONVOLUTIONS, *DEPTHWISE, *SEPARABLE), _kernel_layer),
    ((L.Activation,), _activation_function),
    ((L.ReLU,), _relu),
    ((*ARRANGING, *PADDING, *INACTIVE), _same),
    (AVERAGING, _average),
    (GLOBAL_AVERAGING, _global_average),
    ((L.Add, L.Subtract), _added),
    ((L.Average,), _averaged),
    ((L.Multiply,), _multiplied),
    ((L.Maximum, L.Minimum), _compared),
    ((L.Concatenate,), _joined),
)
