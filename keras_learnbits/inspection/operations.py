"""Multiply-accumulates of each kernel, and which quantized activation they read."""

import math
from typing import NamedTuple

import keras

from keras_learnbits._keras import calls, is_graph, symbolic_inputs
from keras_learnbits.layers.activation import LearnedBitActivation
from keras_learnbits.layers.base import OwnsBits
from keras_learnbits.layers.discovery import learner_of, quantized_tensor_of
from keras_learnbits.layers.quantized_tensors import QuantizedTensor
from keras_learnbits.layers.wrapper import LearnedBitWrapper

L = keras.layers
# Layers whose outputs are values of their input, or zero.
PASSING = (L.Flatten, L.Reshape, L.Permute, L.RepeatVector, L.Dropout, L.SpatialDropout1D,
           L.SpatialDropout2D, L.SpatialDropout3D, L.Identity, L.ZeroPadding1D,
           L.ZeroPadding2D, L.ZeroPadding3D, L.Cropping1D, L.Cropping2D, L.Cropping3D,
           L.MaxPooling1D, L.MaxPooling2D, L.MaxPooling3D, L.GlobalMaxPooling1D,
           L.GlobalMaxPooling2D, L.GlobalMaxPooling3D, L.UpSampling1D)  # fmt: skip
TRANSPOSED = (L.Conv1DTranspose, L.Conv2DTranspose, L.Conv3DTranspose)
SEPARABLE = (L.SeparableConv1D, L.SeparableConv2D)


class Operations(NamedTuple):
    """The operations of a kernel for one example.

    Attributes:
        macs: Number of multiply-accumulates.
        input: `QuantizedTensor` of the quantized activation that it multiplies; None if its input
            is not quantized.
    """

    macs: int
    input: QuantizedTensor | None


def operations(model):
    """The operations of each kernel of a graph of layers.

    Embeddings multiply nothing. Layers with a `LearnedBitWrapper`, inputs with open dimensions, and
    models with a custom `call` are left out, because their operations are not known.

    Args:
        model: A built Keras model; of a distiller the student is used.

    Returns:
        Dictionary of `QuantizedKernel` to `Operations`.

    Examples:
        >>> model = keras.Sequential(
        ...     [keras.Input((6, 6, 3)), keras_learnbits.LearnedBitConv2D(4, 3)])
        >>> [each.macs for each in operations(model).values()]  # 16 positions, 108 weights
        [1728]
    """
    found, model = {}, learner_of(model)
    if is_graph(model) and symbolic_inputs(model) is not None:
        _follow(model, {id(each): None for each in model.inputs}, found)
    return {kernel: each for kernel, each in found.items() if each is not None}


def _follow(graph, sources, found):
    """Adds the operations of a graph's layers to `found`.

    Args:
        graph: Sequential or functional model.
        sources: Dictionary of the `id` of a tensor to the `QuantizedTensor` that it comes from, or
            None.
        found: Dictionary of `QuantizedKernel` to `Operations`, or None where they are not known.
    """
    for call in calls(graph):
        layer, source = call.operation, None
        if is_graph(layer):
            sources |= {
                id(inner): sources[id(outer)]
                for inner, outer in zip(layer.inputs, call.inputs, strict=True)
            }
            _follow(layer, sources, found)
            pairs = zip(layer.outputs, call.outputs, strict=True)
            sources |= {id(outer): sources.get(id(inner)) for inner, outer in pairs}
            continue
        if isinstance(layer, LearnedBitActivation):
            source = quantized_tensor_of(layer.bits)
        elif isinstance(layer, PASSING) or _is_plain_relu(layer):
            source = sources[id(call.inputs[0])]
        elif isinstance(layer, OwnsBits):
            for number, kernel in enumerate(layer.quantized_kernels.values()):
                made = _operations(call, kernel, None if number else sources[id(call.inputs[0])])
                found[kernel] = _sum(found[kernel], made) if kernel in found else made
        sources |= {id(output): source for output in call.outputs}


def _is_plain_relu(layer):
    """Whether a layer is a ReLU that changes no positive number."""
    if not isinstance(layer, L.ReLU):
        return False
    return not layer.negative_slope and not layer.threshold and layer.max_value is None


def _sum(operations, others):
    """`Operations` of a kernel that is used twice; None unless both are known and read the same."""
    if None in (operations, others) or operations.input is not others.input:
        return None
    return Operations(operations.macs + others.macs, operations.input)


def _operations(call, kernel, source):
    """`Operations` of a kernel in one call; None if they are not known.

    Each weight is used once for each position of the output, or with transposed convolutions of the
    input: there are as many as the tensor has numbers per channel.

    Args:
        call: `keras_learnbits._keras.Call`.
        kernel: `QuantizedKernel` of its layer.
        source: `QuantizedTensor` of its input, or None.
    """
    layer = call.operation
    if isinstance(layer, LearnedBitWrapper):
        return None
    if isinstance(layer, L.Embedding):
        return Operations(0, source)
    tensor, shape = call.outputs[0], kernel.kernel.shape
    if isinstance(layer, TRANSPOSED):
        tensor, channels = call.inputs[0], shape[-1]
    elif isinstance(layer, SEPARABLE):
        channels = layer.filters
    else:
        axes = type(layer).quantized_weights[kernel.weight_name].axes_of(layer)
        channels = math.prod(shape[axis] for axis in axes)
    if None in tensor.shape[1:]:
        return None
    return Operations(kernel.size * math.prod(tensor.shape[1:]) // channels, source)
