"""`to_fixed_point`: a learned-bit model in plain Keras layers and fixed-point activations."""

import functools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import keras

from keras_learnbits._keras import calls, is_graph
from keras_learnbits.export._activations import grid_of
from keras_learnbits.export._exactness import (
    ARRANGING,
    INACTIVE,
    PADDING,
    RELU,
    SEPARABLE,
    InexactError,
    Levels,
    output_levels,
)
from keras_learnbits.layers.activation import LearnedBitActivation
from keras_learnbits.layers.base import OwnsBits
from keras_learnbits.layers.discovery import free_name
from keras_learnbits.layers.float_weights import assign_all
from keras_learnbits.layers.layer_copy import copy_layer
from keras_learnbits.serialization import register

L = keras.layers


@register
class FixedPoint(L.Layer):
    """Rounds its input to a fixed-point type, as `LearnedBitActivation` does.

    Args:
        bits: Number of bits.
        step: The power of two that the values are multiples of.
        signed: Whether half of the values are negative.
        **kwargs: `name` and `dtype`.
    """

    def __init__(self, bits, step, signed, **kwargs):
        super().__init__(**kwargs)
        self.bits, self.step, self.signed = bits, step, signed
        self.lowest = -(2 ** (bits - 1)) if signed else 0
        self.highest = self.lowest + 2**bits - 1

    def call(self, inputs):
        levels = keras.ops.floor(inputs * (1 / self.step) + 0.5)
        return keras.ops.clip(levels, self.lowest, self.highest) * self.step

    def fixed_point_type(self):
        """Whether it is signed, its bits, and its integer bits with the sign, three integers."""
        return int(self.signed), self.bits, self.bits + round(math.log2(self.step))

    def get_config(self):
        own = {"bits": self.bits, "step": self.step, "signed": self.signed}
        return {**super().get_config(), **own}


@register
class Padding(L.Layer):
    """Pads its input with zeros.

    Args:
        padding: List of pairs, the numbers of zeros before and after, one pair for each axis.
        **kwargs: `name` and `dtype`.
    """

    def __init__(self, padding, **kwargs):
        super().__init__(**kwargs)
        self.padding = [tuple(pair) for pair in padding]

    def call(self, inputs):
        return keras.ops.pad(inputs, [(0, 0), *self.padding, (0, 0)])

    def get_config(self):
        return {**super().get_config(), "padding": self.padding}


def to_fixed_point(model):
    """A copy of the model for hardware compilers, in plain Keras layers and `FixedPoint`.

    All numbers in it are integers times powers of two, and all sums fit into 24 bits, so that
    float32 computes exactly what a circuit of integers does. Graphs inside are merged into one, and
    layers are replaced where compilers need others: separable convolutions by two, global pooling
    by pooling of the whole size, zero padding by `Padding`.

    Args:
        model: A built functional or Sequential model that was converted with `activations` and
            `power_of_two`.

    Returns:
        Functional `keras.Model` with the predictions of `model`, in float32.

    Raises:
        ValueError: A layer cannot be computed exactly; the message names it and the way out.

    Examples:
        >>> model = keras_learnbits.LearnedBitSequential(
        ...     [keras.Input((4,)), keras_learnbits.LearnedBitActivation(6, power_of_two=True),
        ...      keras_learnbits.LearnedBitDense(
        ...          2, kernel_quantizer=keras_learnbits.LearnedScaleQuantizer(power_of_two=True))])
        >>> _ = model(np.ones((8, 4)), training=True)  # fits the range of the activation
        >>> [type(layer).__name__ for layer in to_fixed_point(model).layers]
        ['InputLayer', 'FixedPoint', 'Dense']
    """
    if not isinstance(model, keras.Model) or not model.built or not is_graph(model):
        raise ValueError(
            "A circuit is made of a built Sequential or functional model; a custom `call` has no "
            f"graph of layers. Received: model={model!r}"
        )
    _check_sizes(model)
    names = set()
    inputs = [
        keras.Input(batch_shape=each.shape, dtype="float32", name=_name(each.name, names))
        for each in model.inputs
    ]
    pairs = zip(model.inputs, inputs, strict=True)
    known = {id(each): _Known(lambda first, new=new: first(new)) for each, new in pairs}
    _follow(model, known, names, ())
    found = [known[id(each)] for each in model.outputs]
    outputs = [each.build(_unchanged) for each in found]
    outputs = _lossless(inputs, outputs, [each.levels for each in found], names)
    return keras.Model(inputs, outputs, name=_name(model.name))


def _check_sizes(model):
    """Raises a ValueError if a dimension other than the batch is open."""
    shapes = {each.name: each.shape for each in model.inputs}
    if any(None in shape[1:] for shape in shapes.values()):
        raise ValueError(
            "A circuit has inputs of fixed sizes: build the model with `keras.Input` of a known "
            f"shape. Received: {shapes}"
        )


class _Known(NamedTuple):
    """The replacement of a tensor in the new model.

    Attributes:
        build: Function that returns the `keras.KerasTensor` of the new model. It takes a function
            that is applied to the model's inputs first: layers that only move values may come
            before the first quantizer, and compilers want the quantizer first. Rounding commutes
            with them. Tensors that are quantized already ignore it.
        levels: `Levels` of its values; None if they are not quantized yet.
    """

    build: Callable
    levels: Levels | None = None


def _unchanged(tensor):
    return tensor


def _follow(graph, known, names, path):
    """Adds the outputs of a graph's layers.

    Args:
        graph: Sequential or functional model.
        known: Dictionary of the `id` of a tensor to `_Known`.
        names: Set of the names of the new layers.
        path: Tuple of the names of the graphs that this one is in.
    """
    for call in calls(graph):
        layer = call.operation
        if is_graph(layer):
            for inner, outer in zip(layer.inputs, call.inputs, strict=True):
                known[id(inner)] = known[id(outer)]
            _follow(layer, known, names, (*path, layer.name))
            for inner, outer in zip(layer.outputs, call.outputs, strict=True):
                known[id(outer)] = known[id(inner)]
            continue
        try:
            made = _called(call, [known[id(each)] for each in call.inputs], names)
        except InexactError as error:
            raise ValueError(
                "A circuit must compute exactly what its model predicts. "
                f"Received: layer {'/'.join((*path, layer.name))!r}; {error}"
            ) from None
        known[id(call.outputs[0])] = made


def _called(call, inputs, names):
    """The `_Known` of the output of a call.

    Args:
        call: `keras_learnbits._keras.Call` of a layer.
        inputs: List of `_Known`, its inputs.
        names: Set of the names of the new layers.
    """
    layer = call.operation

    def apply(tensors):
        plain = _plain(call, functools.partial(_name, layer.name, names))
        output = tensors
        for each in plain:
            output = each(output)
        if isinstance(layer, OwnsBits):
            weights = [weight for each in plain for weight in each.weights]
            assign_all(weights, layer.plain_weights())
        return output

    moves = isinstance(layer, (*ARRANGING, *PADDING, *INACTIVE, L.Concatenate))
    if moves and all(each.levels is None for each in inputs):
        return _Known(lambda first: apply(_one_or_list([each.build(first) for each in inputs])))
    levels = output_levels(call, [each.levels for each in inputs])
    if isinstance(layer, LearnedBitActivation) and inputs[0].levels is None:
        output = inputs[0].build(apply)
    else:
        output = apply(_one_or_list([each.build(_unchanged) for each in inputs]))
    return _Known(lambda first: output, levels)


def _one_or_list(tensors):
    return tensors[0] if len(tensors) == 1 else tensors


def _lossless(inputs, outputs, levels, names):
    """Outputs that keep all their bits.

    hls4ml keeps only those bits of a tensor that the layers that read it need. An output that is
    also read by a layer therefore gets a `FixedPoint` that does not change its values.

    Args:
        inputs: List of the inputs of the new model.
        outputs: List of its outputs.
        levels: List of the `Levels` of each output, or None.
        names: Set of the names of the new layers.
    """
    graph = keras.Model(inputs, outputs, name="circuit")
    readers = {id(each) for call in calls(graph) for each in call.inputs}
    lossless = []
    for output, known in zip(outputs, levels, strict=True):
        if id(output) in readers and known is not None:
            of_all = known.of_all()
            bits = 1 + math.ceil(math.log2(of_all.largest / of_all.step + 1))
            name = _name("output", names)
            exact = FixedPoint(bits, float(of_all.step), True, name=name, dtype="float32")
            output = exact(output)
        lossless.append(output)
    return lossless


def _plain(call, name):
    """The layers that replace one layer, not built.

    Args:
        call: `keras_learnbits._keras.Call` of a layer of a learned-bit model.
        name: Function without arguments that returns the next free name.

    Returns:
        List of layers to call one after the other.
    """
    layer = call.operation
    if isinstance(layer, LearnedBitActivation):
        grid = grid_of(layer)
        step = float(grid.step)
        return [FixedPoint(grid.bits, step, grid.signed, name=name(), dtype="float32")]
    if isinstance(layer, L.ReLU):
        return [L.Activation(RELU, name=name(), dtype="float32")]
    if isinstance(layer, PADDING):
        pairs = layer.padding if isinstance(layer, L.ZeroPadding2D) else [layer.padding]
        return [Padding(pairs, name=name(), dtype="float32")]
    if isinstance(layer, SEPARABLE):
        return _depthwise_and_pointwise(layer, name)
    if isinstance(layer, (L.GlobalAveragePooling2D, L.GlobalMaxPooling2D)):
        return _pooling_all(call, name)
    if isinstance(layer, INACTIVE):
        return []
    if isinstance(layer, L.Concatenate):
        # hls4ml counts axes without that of the batch, so they are counted from the end.
        rank = len(call.outputs[0].shape)
        return [L.Concatenate(layer.axis % rank - rank, name=name(), dtype="float32")]
    twin = layer.plain_twin() if isinstance(layer, OwnsBits) else layer
    return [copy_layer(twin, name=name(), dtype="float32")]


def _depthwise_and_pointwise(layer, name):
    """The two convolutions of a separable one, for which hls4ml 1.3 has no working handler."""
    ranks = (L.DepthwiseConv1D, L.Conv1D), (L.DepthwiseConv2D, L.Conv2D)
    depthwise, pointwise = ranks[len(layer.kernel_size) - 1]
    return [
        depthwise(
            layer.kernel_size, layer.strides, layer.padding, layer.depth_multiplier,
            use_bias=False, name=name(), dtype="float32",
        ),
        pointwise(
            layer.filters, 1, activation=layer.activation, use_bias=layer.use_bias, name=name(),
            dtype="float32",
        ),
    ]  # fmt: skip


def _pooling_all(call, name):
    """Pooling of a window as large as the input: hls4ml 1.3 gets the shape of global pooling wrong.

    `_produce_kif` in hls4ml/model/optimizer/passes/bit_exact.py has one axis too many in two
    dimensions, and fails if a quantizer follows.
    """
    layer = call.operation
    averages = isinstance(layer, L.GlobalAveragePooling2D)
    pooling = L.AveragePooling2D if averages else L.MaxPooling2D
    layers = [pooling(call.inputs[0].shape[1:3], name=name(), dtype="float32")]
    return layers if layer.keepdims else [*layers, L.Flatten(name=name(), dtype="float32")]


# Names that C++ or hls4ml reserve, and that may well be names of inputs and layers.
RESERVED = {"input", "int", "float", "double", "char", "bool", "auto", "class", "default", "new",
            "this", "operator", "template", "union", "switch", "signed", "unsigned", "long",
            "short", "register", "return", "static", "struct", "void"}  # fmt: skip


def _name(name, taken=None):
    """A name that C++ takes."""
    name = re.sub(r"\W", "_", name)
    name = f"layer_{name}" if not name[0].isalpha() or name in RESERVED else name
    return name if taken is None else free_name(name, taken)
