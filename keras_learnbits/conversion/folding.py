"""`fold_batch_norm`: a model without the batch norms that follow its layers."""

import keras
import numpy as np

from keras_learnbits._keras import calls, is_graph, is_hidden_graph, symbolic_inputs
from keras_learnbits.conversion.copying import copy_model, copy_state
from keras_learnbits.layers.base import OwnsBits, keras_twin
from keras_learnbits.layers.compute_scope import keeping_scales
from keras_learnbits.layers.float_weights import float_weights
from keras_learnbits.layers.layer_copy import copy_layer
from keras_learnbits.layers.traversal import layers_inside
from keras_learnbits.layers.twins import LEARNED_BIT_LAYERS
from keras_learnbits.quantizers import LearnedScaleQuantizer
from keras_learnbits.training.model import LearnedBitModel, LearnedBitSequential

L = keras.layers
# Layers whose output channels a factor of the kernel scales. The last kernel of a separable
# convolution is the pointwise one.
SCALED = (L.Dense, L.Conv1D, L.Conv2D, L.Conv3D, L.DepthwiseConv1D, L.DepthwiseConv2D,
          L.SeparableConv1D, L.SeparableConv2D, L.Conv1DTranspose, L.Conv2DTranspose,
          L.Conv3DTranspose)  # fmt: skip
TRANSPOSED = (L.Conv1DTranspose, L.Conv2DTranspose, L.Conv3DTranspose)
DEPTHWISE = (L.DepthwiseConv1D, L.DepthwiseConv2D)
# Factor of a scale in place of 0, whose logarithm is infinite.
SMALLEST_FACTOR = 2.0**-60


def fold_batch_norm(model):
    """A copy of a model in which batch norms are part of the layers before them.

    In inference a batch norm multiplies each channel by a constant and adds another one. After a
    dense layer or a convolution, kernel and bias can absorb these constants: the copy makes the
    same predictions with fewer operations. It has no batch statistics to train, so fold a model
    that is trained already. Kernels of `LearnedScaleQuantizer` with a scale per channel keep their
    codes. The scales of other learned-bit layers are fitted to the new kernels, which changes
    predictions.

    A batch norm is folded if it directly follows such a layer of a class of Keras or this library
    (not a subclass), which has no activation and no constraint, and nothing else reads the output
    of that layer. All other batch norms are copied.

    Args:
        model: A built Sequential or functional model, of Keras or learned-bit layers.

    Returns:
        A new model, not compiled. Its layers have the names of the layers of `model`.

    Raises:
        ValueError: The model is not built, or has a custom `call`.

    Examples:
        >>> model = keras.Sequential(
        ...     [keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3, use_bias=False),
        ...      keras.layers.BatchNormalization(), keras.layers.ReLU()])
        >>> [type(layer).__name__ for layer in fold_batch_norm(model).layers]
        ['Conv2D', 'ReLU']
    """
    if not isinstance(model, keras.Model) or not model.built or not is_graph(model):
        raise ValueError(
            "`fold_batch_norm` needs a built Sequential or functional model. "
            f"Received: model={model!r}"
        )
    folded = foldable(model)
    norms = set(folded.values())
    # A functional model names its outputs after the layers that make them.
    of_outputs = {
        call.operation
        for call in ([] if isinstance(model, keras.Sequential) else calls(model))
        if any(output is each for output in call.outputs for each in model.outputs)
    }

    def replace_layer(layer):
        if layer in norms and layer in of_outputs:
            identity = L.Identity(name=layer.name, dtype=layer.dtype_policy)
            return lambda inputs, **ignored: identity(inputs)
        if layer in norms:
            return None
        return copy_layer(layer, use_bias=True) if layer in folded else copy_layer(layer)

    def copy_weights(layer, copy):
        if layer not in folded:
            return copy_state(layer, copy)
        _fold(layer, folded[layer], copy)
        return {}

    classes = keras.Model, keras.Sequential
    if isinstance(model, (LearnedBitModel, LearnedBitSequential)):
        classes = LearnedBitModel, LearnedBitSequential
    copy, _ = copy_model(
        model, replace_layer, None, copy_weights, classes=classes, same_weights=False
    )
    return copy


def foldable(model):
    """The batch norms of a graph, and of those inside, that can be folded.

    Returns:
        Dictionary of the layer that each is folded into to the batch norm.
    """
    found, called = {}, {}
    for graph, chain in layers_inside(model).items():
        hidden = chain and is_hidden_graph(graph, (model, *chain)[-2])
        if hidden or not all(map(is_graph, (model, *chain))) or symbolic_inputs(graph) is None:
            continue
        in_graph = calls(graph)
        makers = {id(output): call for call in in_graph for output in call.outputs}
        readers = {}
        for call in in_graph:
            called[call.operation] = called.get(call.operation, 0) + 1
            for each in call.inputs:
                readers[id(each)] = readers.get(id(each), 0) + 1
        for output in graph.outputs:
            readers[id(output)] = readers.get(id(output), 0) + 1
        for call in in_graph:
            if type(call.operation) is not L.BatchNormalization or len(call.inputs) != 1:
                continue
            maker = makers.get(id(call.inputs[0]))
            if maker is None or readers[id(call.inputs[0])] > 1:
                continue
            if _scales_channels(maker.operation, call):
                found[maker.operation] = call.operation
    return {layer: norm for layer, norm in found.items() if called[layer] == called[norm] == 1}


def _scales_channels(layer, norm):
    """Whether a layer's kernel can absorb the factors of the batch norm that follows it.

    Args:
        layer: The layer.
        norm: `Call` of the batch norm.
    """
    # Subclasses may compute something else.
    kind = keras_twin(type(layer)) if isinstance(layer, OwnsBits) else type(layer)
    is_own = type(layer) in LEARNED_BIT_LAYERS or kind is type(layer)
    if kind not in SCALED or not is_own or layer.activation is not keras.activations.linear:
        return False
    if getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None):
        return False
    constrained = [
        value for name, value in vars(layer).items() if name.endswith("_constraint") and value
    ]
    channels_first = getattr(layer, "data_format", "channels_last") == "channels_first"
    rank = len(norm.inputs[0].shape)
    axis = norm.operation.axis % rank
    return not constrained and axis == (1 if channels_first else rank - 1)


def _fold(layer, norm, copy):
    """Sets the weights of a layer's copy to those of the layer and its batch norm together."""
    mean, variance, gamma, beta = (
        np.asarray(each, "float64") if each is not None else neutral
        for each, neutral in (
            (norm.moving_mean, 0.0),
            (norm.moving_variance, 1.0),
            (norm.gamma, 1.0),
            (norm.beta, 0.0),
        )
    )
    factor = gamma / np.sqrt(variance + norm.epsilon)
    bias = np.asarray(layer.bias, "float64") if layer.use_bias else 0.0
    kernels = [variable for variable in float_weights(layer) if variable is not layer.bias]
    *others, last = [np.asarray(kernel, "float64") for kernel in kernels]
    of_kernel = factor
    if isinstance(layer, DEPTHWISE):
        of_kernel = of_kernel.reshape(last.shape[-2:])
    elif isinstance(layer, TRANSPOSED):
        of_kernel = of_kernel[:, None]
    last = last * of_kernel
    if isinstance(copy, OwnsBits):
        for kernel, source in zip(
            copy.quantized_kernels.values(), layer.quantized_kernels.values(), strict=True
        ):
            kernel.bits.assign(source.bits)
            if kernel.log_scale is not None:
                kernel.log_scale.assign(source.log_scale)
    values = [*others, last, (bias - mean) * factor + beta]
    with keeping_scales():
        for variable, value in zip(float_weights(copy), values, strict=True):
            variable.assign(value)
    if isinstance(copy, OwnsBits):
        [*_, kernel] = copy.quantized_kernels.values()
        _scale_by(kernel, of_kernel)


def _scale_by(kernel, factor):
    """Gives a kernel the scales for weights that were multiplied by factors, one per channel.

    Its grid is symmetric, so that a negative factor exchanges codes.
    """
    quantizer = kernel.quantizer
    keeps_codes = (
        type(quantizer) is LearnedScaleQuantizer
        and quantizer.per_channel
        and not quantizer.power_of_two
    )
    if not keeps_codes:
        kernel.fit_scale()
        return
    change = np.log(np.maximum(np.abs(factor), SMALLEST_FACTOR))
    kernel.log_scale.assign(kernel.log_scale + change.reshape(kernel.log_scale.shape))
