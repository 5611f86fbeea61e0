"""`to_fixed_point`: a learned-bit model in plain Keras layers and fixed-point activations."""

import functools
import math
import re

import keras

from keras_learnbits._keras import calls, is_graph
from keras_learnbits.export._activations import grid_of
from keras_learnbits.export._fixed_point import (
    INACTIVE,
    PADDING,
    RELU,
    SEPARABLE,
    InexactError,
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
    """Zeros around its input.

    Args:
        padding: Pairs of the numbers of zeros before and after, one pair for each axis.
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
            f"layers that could be followed. Received: model={model!r}"
        )
    names = set()
    inputs = [
        keras.Input(batch_shape=each.shape, dtype="float32", name=_name(each.name, names))
        for each in model.inputs
    ]
    known = {id(each): (new, None) for each, new in zip(model.inputs, inputs, strict=True)}
    _follow(model, known, names, ())
    return keras.Model(
        inputs, [known[id(each)][0] for each in model.outputs], name=_name(model.name)
    )


def _follow(graph, known, names, path):
    """Adds the outputs of a graph's layers.

    Args:
        graph: Sequential or functional model.
        known: Dictionary of the `id` of a tensor to the new tensor and its `Levels`, or None.
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
        tensors, levels = zip(*(known[id(each)] for each in call.inputs), strict=True)
        try:
            made = output_levels(call, list(levels))
        except InexactError as error:
            raise ValueError(
                "A circuit must compute exactly what its model predicts. "
                f"Received: layer {'/'.join((*path, layer.name))!r}; {error}"
            ) from None
        arguments = tensors[0] if len(tensors) == 1 else list(tensors)
        output = arguments
        if not isinstance(layer, INACTIVE):
            plain = _plain(call, functools.partial(_name, layer.name, names))
            for each in plain:
                output = each(output)
            if isinstance(layer, OwnsBits):
                weights = [weight for each in plain for weight in each.weights]
                assign_all(weights, layer.plain_weights())
        known[id(call.outputs[0])] = output, made


def _plain(call, name):
    """The layers that take the place of one layer, not built.

    Args:
        call: `keras_learnbits._keras.Call` of a layer of a learned-bit model.
        name: Function without arguments to the next free name.

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


def _name(name, taken=None):
    """A name that C++ takes."""
    name = re.sub(r"\W", "_", name)
    name = f"layer_{name}" if not name[0].isalpha() else name
    return name if taken is None else free_name(name, taken)
