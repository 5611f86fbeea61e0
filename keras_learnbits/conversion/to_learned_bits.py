"""`to_learned_bits`: converts a Keras model to one that learns its bit-widths."""

import functools
import math

import keras

from keras_learnbits._keras import is_graph, scope_name, symbolic_inputs
from keras_learnbits.arguments import check_number
from keras_learnbits.conversion.copying import build_copy, copy_model, copy_state
from keras_learnbits.conversion.folding import fold_batch_norm, foldable
from keras_learnbits.conversion.selection import Selection, left_behind
from keras_learnbits.conversion.verification import check_conversion
from keras_learnbits.layers.activation import LearnedBitActivation
from keras_learnbits.layers.base import OwnsBits, check_bits
from keras_learnbits.layers.checks import check_built, check_finite_weights
from keras_learnbits.layers.compute_scope import keeping_scales
from keras_learnbits.layers.discovery import free_name, quantized_kernels
from keras_learnbits.layers.float_weights import assign_all, float_weights
from keras_learnbits.layers.layer_copy import copy_layer
from keras_learnbits.layers.traversal import kernels_inside, layers_inside
from keras_learnbits.layers.twins import TWINS
from keras_learnbits.layers.wrapper import LearnedBitWrapper
from keras_learnbits.quantizers import LearnedScaleQuantizer
from keras_learnbits.training.model import (
    LearnedBitModel,
    LearnedBitSequential,
    LearnedBitSubclassed,
)


def to_learned_bits(
    model,
    include=None,
    exclude=None,
    *,
    x=None,
    copy=True,
    bits=8,
    min_bits=1,
    max_bits=None,
    kernel_quantizer="learned_scale",
    activations=False,
    power_of_two=False,
):
    """Converts a Keras model to one that learns how many bits its kernels need.

    The new model has the weights of the old one, and its layers have the same names, dtype
    policies, regularizers and `trainable` flags; it is not compiled. The old model does not change.
    A layer with a learned-bit twin becomes that twin, with scales fitted to the weights. Recurrent
    layers, `MultiHeadAttention`, wrappers, and custom blocks and models that contain such layers
    are put into a `LearnedBitWrapper`, which quantizes the kernels inside. All other layers are
    copied. Learned-bit layers are copied with their bits, so that a second call can convert other
    layers with other settings.

    A layer that is called several times is converted once, under the path of its first call.

    Args:
        model: A built Keras model: Sequential, functional, or with a custom `call`, in which case
            its class must be able to make it from its `get_config`. Other custom methods, such as
            `train_step`, are not kept; the report names them.
        include: Layers to convert; all by default. A `fnmatch` pattern of names or paths
            (`"block1/*"`), a layer, a layer class, a predicate of a layer, or a list of these.
        exclude: Layers not to convert, in the same forms; it overrides `include`.
        x: Example input of the model. The predictions of the copy for it, at its float kernels, are
            compared with those of the model. By default random inputs of the model's shapes, if
            these are known.
        copy: Whether the new model is a copy. If False, layers without a twin are not copied, so
            their class needs no `get_config`. The original then shares weights with the new model
            and must not be used any more. The new model can be trained, and its weights can be
            saved. Keras can save it as a whole only if it could save the original.
        bits: Initial bit-width.
        min_bits: Lowest bit-width.
        max_bits: Highest bit-width; by default 8, or `bits` if that is more.
        kernel_quantizer: `"learned_scale"`, `"min_max"` or a quantizer.
        activations: Whether to quantize the inputs of each converted layer, too; or a dictionary
            of settings of `LearnedBitActivation`, which is put before the layer. The model's float
            inputs are among them (an image of 256 levels is exact at 8 bits), and the operands of
            `Add` layers, so that runtimes can compute in integers throughout. Activations inside a
            `LearnedBitWrapper` stay float.
        power_of_two: Whether all numbers are integers times powers of two, as circuits compute
            (`export_hls4ml`): the steps of kernels (`LearnedScaleQuantizer(power_of_two=True)`) and
            of activations are powers of two, biases are rounded to fixed point in training and
            after it, and batch norms are folded into the layers before them (`fold_batch_norm`).

    Returns:
        `LearnedBitModel` or, for a Sequential model without `activations`,
        `LearnedBitSequential`. Print its attribute `conversion` for a report of which layers were
        converted, and why others were not.

    Raises:
        ValueError: `power_of_two` is given with a `kernel_quantizer`, or with `copy=False` for a
            model with batch norms to fold; the model is not built; there is no layer to convert; a
            pattern or class in `include` or `exclude` matches no layer; a layer to convert has
            integer weights or LoRA; a layer is shared between models in a way that Keras cannot
            copy; `activations` are given for a model with a custom `call`; a weight is NaN or
            infinite; layers share weights in a way that a copy cannot; or the predictions of the
            copy differ.

    Examples:
        >>> model = keras.Sequential(
        ...     [keras.Input((8,)), keras.layers.Dense(4, name="hidden"),
        ...      keras.layers.Dense(2, name="head")])
        >>> learned = to_learned_bits(model, exclude="head")
        >>> print(learned.conversion)
        layer   type   conversion       weights
        ---------------------------------------
        hidden  Dense  LearnedBitDense       36
        head    Dense  left: excluded        10
        ---------------------------------------
        conversion: the new class, or why the layer is not converted; weights: number of parameters
        32 weights (69.6%) with learned bits, 14 (30.4%) left float
    """
    _check_model(model, activations)
    folds = foldable(model) if power_of_two and is_graph(model) else {}
    if power_of_two:
        kernel_quantizer = _power_of_two_quantizer(kernel_quantizer)
        _check_copies(folds, copy)
    settings = _bit_settings(bits, min_bits, max_bits, kernel_quantizer)
    make_activation = _make_activation(activations, power_of_two)
    check_finite_weights(model, "`to_learned_bits`")
    selection = Selection(model, include, exclude)
    converter = _LayerConverter(selection, settings, reuse_layers=not copy)
    quantizer = _InputQuantizer(make_activation, converter.new_layers, selection.names)
    converted, _ = copy_model(
        model,
        converter.replace_layer,
        converter.replace_model,
        _copy_weights,
        call_layer=quantizer.call_layer if make_activation else None,
        classes=(LearnedBitModel, LearnedBitSequential),
        reuse_layers=not copy,
    )
    if folds:
        folded = {norm.name: layer.name for layer, norm in foldable(converted).items()}
        converted = fold_batch_norm(converted)
        for norm in folds.values():
            if norm.name in folded:
                converter.outcomes[norm] = f"folded into {folded[norm.name]}"
    notes = [*left_behind(model), check_conversion(model, converted, x) if copy else None]
    learned = sum(kernel.size for kernel in quantized_kernels(converted))
    total = sum(math.prod(weight.shape) for weight in float_weights(converted))
    converted.conversion = selection.report(
        converter.outcomes, quantizer.activations, (learned, total), filter(None, notes)
    )
    return converted


def _check_model(model, activations):
    """Raises a ValueError if a model cannot be converted, or not with these `activations`."""
    if not isinstance(model, keras.Model):
        raise ValueError(f"`to_learned_bits` needs a Keras model. Received: model={model!r}")
    check_built(model, "to_learned_bits")
    if isinstance(model, keras.Sequential) and symbolic_inputs(model) is None:
        raise ValueError(
            "A Sequential model must have one symbolic input, as from `keras.Input`. "
            f"Received: model={model.name!r}"
        )
    if activations not in (False, None) and not is_graph(model):
        raise ValueError(
            "`activations` are quantized in Sequential and functional models; in a custom `call` "
            f"use `LearnedBitActivation`. Received: model={model.name!r}"
        )


def _power_of_two_quantizer(kernel_quantizer):
    """The default quantizer with steps that are powers of two."""
    if kernel_quantizer != "learned_scale":
        raise ValueError(
            "`power_of_two` goes with the default `kernel_quantizer`; give "
            "`LearnedScaleQuantizer(power_of_two=True)` and other settings yourself. "
            f"Received: kernel_quantizer={kernel_quantizer!r}"
        )
    return LearnedScaleQuantizer(power_of_two=True)


def _check_copies(folds, copy):
    """Raises a ValueError if batch norms are to be folded into layers that are not copied."""
    if folds and not copy:
        raise ValueError(
            "`power_of_two` folds batch norms into copies of layers, and `copy=False` makes none: "
            "call `fold_batch_norm(model)` first. "
            f"Received: batch norms {[norm.name for norm in folds.values()]}"
        )


def _bit_settings(bits, min_bits, max_bits, kernel_quantizer):
    """Settings of the learned-bit layers, a dictionary."""
    check_number("bits", bits)
    max_bits = max(8, math.ceil(bits)) if max_bits is None else max_bits
    check_bits(bits, min_bits, max_bits)
    return {
        "bits": bits,
        "min_bits": min_bits,
        "max_bits": max_bits,
        "kernel_quantizer": kernel_quantizer,
    }


def _make_activation(activations, power_of_two):
    """A function of `name` and `dtype` that makes a `LearnedBitActivation`, or None."""
    if activations in (False, None):
        return None
    settings = {} if activations is True else activations
    if not isinstance(settings, dict) or {"name", "dtype"} & settings.keys():
        raise ValueError(
            "`activations` must be True, False, or a dictionary of settings of "
            "`LearnedBitActivation` without `name` and `dtype`. "
            f"Received: activations={activations!r}"
        )
    if power_of_two:
        settings = {"power_of_two": True, **settings}
    return functools.partial(LearnedBitActivation, **settings)


class _LayerConverter:
    """Converts the selected layers to learned-bit layers, and copies the others.

    Args:
        selection: `Selection`.
        settings: Dictionary of settings of the learned-bit layers.
        reuse_layers: Whether layers are used without copying them.

    Attributes:
        outcomes: Dictionary of each selected layer to a string, its new class.
        new_layers: Set of the new learned-bit layers.
    """

    def __init__(self, selection, settings, reuse_layers):
        self.selection = selection
        self.settings = settings
        self.reuse_layers = reuse_layers
        self.outcomes = {}
        self.new_layers = set()

    def replace_layer(self, layer):
        """The layer that replaces one of the original, for `copy_model`."""
        wanted = [each for each in layers_inside(layer) if self.selection.wants(each)]
        new = self._twin(layer) if wanted else None
        if new is not None:
            self.outcomes[layer] = type(new).__name__
            self.new_layers.add(new)
            return new
        new = layer if self.reuse_layers else copy_layer(layer)
        if not wanted:
            return new
        # The wrapper quantizes all kernels inside except the excluded ones.
        self.outcomes |= dict.fromkeys(wanted, f"in LearnedBitWrapper {layer.name!r}")
        excluded = [
            number
            for number, (chain, _, _) in enumerate(kernels_inside(layer))
            if (chain[-1] if chain else layer) not in wanted
        ]
        new = LearnedBitWrapper(new, exclude=excluded, **self.settings)
        self.new_layers.add(new)
        return new

    def _twin(self, layer):
        """The learned-bit twin of a Keras layer; None if there is none."""
        if type(layer) not in TWINS:
            return None
        try:
            return copy_layer(layer, TWINS[type(layer)], **self.settings)
        except ValueError:
            # Its configuration has something that cannot be copied, such as a lambda. A wrapper can
            # use the layer itself.
            if self.reuse_layers:
                return None
            raise

    def replace_model(self, model):
        """The copy of a model with a custom `call`, for `copy_model`."""
        wrapper = self.replace_layer(model)
        if wrapper.layer is not model:
            build_copy(model, wrapper.layer)
        wrapper.build()
        return LearnedBitSubclassed(wrapper, name=scope_name(model.name))


class _InputQuantizer:
    """Puts a `LearnedBitActivation` before converted layers and sums.

    The operands of a sum are quantized so that runtimes can compute it in integers. A tensor that
    several layers read is quantized once.

    Args:
        make_activation: Function of `name` and `dtype` to a `LearnedBitActivation`, or None.
        converted: Set of the layers whose inputs are quantized; it may grow.
        layers: Layers of the model, whose names are taken.

    Attributes:
        activations: List of the inserted layers.
    """

    def __init__(self, make_activation, converted, layers):
        self.make_activation = make_activation
        self.converted = converted
        self.names = {layer.name for layer in layers}
        self.activations = []
        # Dictionary of the `id` of a tensor to the tensor and its replacement. Keeping the tensor
        # prevents Python from reusing its `id`.
        self.replacements = {}

    def call_layer(self, layer, *args, **kwargs):
        """Calls a layer of the copy, for `copy_model`."""
        if layer in self.converted or isinstance(layer, keras.layers.Add):
            args, kwargs = keras.tree.map_structure(
                lambda value: self._quantized(value, layer), (args, kwargs)
            )
        outputs = layer(*args, **kwargs)
        if isinstance(layer, LearnedBitActivation):
            self.replacements[id(outputs)] = outputs, outputs  # it is quantized already
        return outputs

    def _quantized(self, value, layer):
        """The argument of a converted layer that replaces a value."""
        if not isinstance(value, keras.KerasTensor) or "float" not in value.dtype:
            return value
        if id(value) not in self.replacements:
            name = free_name(f"{layer.name}_input", self.names)
            activation = self.make_activation(name=name, dtype=value.dtype)
            self.activations.append(activation)
            self.replacements[id(value)] = value, activation(value)
        return self.replacements[id(value)][1]


def _copy_weights(layer, copy):
    """Copies weights, and fits the scales of converted layers to them, for `copy_model`."""
    if isinstance(copy, LearnedBitSubclassed) and not isinstance(layer, LearnedBitSubclassed):
        copy = copy.wrapper
    if isinstance(layer, OwnsBits) or not isinstance(copy, OwnsBits):
        return copy_state(layer, copy)
    copies = {}
    if isinstance(copy, LearnedBitWrapper):
        copies = copy_state(layer, copy.layer)
    else:
        with keeping_scales():
            assign_all(float_weights(copy), layer.weights)
    for kernel in copy.quantized_kernels.values():
        kernel.fit_scale()
    return copies
