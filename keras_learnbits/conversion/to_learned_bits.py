"""`to_learned_bits`: converts a Keras model to one that learns its bit-widths."""

import functools
import itertools
import math

import keras

from keras_learnbits.arguments import check_number
from keras_learnbits.conversion.copying import Copier, build_like, from_config, is_graph
from keras_learnbits.conversion.selection import Selection, left_behind
from keras_learnbits.conversion.verification import check_conversion
from keras_learnbits.layers.activation import LearnedBitActivation
from keras_learnbits.layers.base import OwnsBits, check_bits
from keras_learnbits.layers.checks import check_finite_weights
from keras_learnbits.layers.compute_scope import keeping_scales
from keras_learnbits.layers.discovery import quantized_kernels
from keras_learnbits.layers.float_weights import assign_all, float_weights
from keras_learnbits.layers.traversal import kernels_inside, layers_inside
from keras_learnbits.layers.twins import TWINS
from keras_learnbits.layers.wrapper import LearnedBitWrapper
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
):
    """Converts a Keras model to one that learns how many bits its kernels need.

    The new model has the weights of the old one, which is not touched, its layers' names,
    dtype policies, regularizers and what is trainable; it is not compiled. Layers with a
    learned-bit twin become that twin, whose scales are fitted to the weights. Recurrent layers,
    `MultiHeadAttention`, wrappers, and blocks and models of your own that hold such layers are
    put into a `LearnedBitWrapper`, which quantizes the kernels inside. All else is copied.
    Learned-bit layers are copied with their bits, so that a second call may convert other layers
    with other settings.

    A layer is converted or not, wherever it is called: one that is shared is found under the
    path at which it comes first.

    Args:
        model: A built Keras model: Sequential, functional, or with a `call` of its own, which
            then needs a `get_config` that its class can be made from; its own methods, as a
            `train_step`, are left behind, and the report says which.
        include: Which layers to convert; all by default. A pattern of names or paths
            (`"block1/*"`), as `fnmatch` takes it, a layer, a layer class, a function of a
            layer to whether it is meant, or a list of these.
        exclude: Which not, likewise; before `include`.
        x: An example, what the model is called with, on which the copy's predictions at its float
            kernels are compared with the model's. By default random inputs of the model's shapes,
            where it has some.
        copy: Whether the new model is a copy. If False, layers that are not converted to a twin
            are taken themselves, also those whose class has no `get_config`; the original shares
            weights with the new model then, and must not be used any more. What is made in this
            way can be trained, and its weights can be saved; Keras cannot save it whole where it
            could not save the original.
        bits: Bit-width to start at.
        min_bits: Lowest bit-width.
        max_bits: Highest bit-width; 8 by default, or `bits` where that is more.
        kernel_quantizer: `"learned_scale"`, `"min_max"` or a quantizer.
        activations: Whether to quantize what flows into each converted layer, too; or a
            dictionary of settings of `LearnedBitActivation`, which is put before the layer. The
            model's own inputs are not quantized where its graph reads them, but those of nested
            models are. What flows inside a `LearnedBitWrapper` stays float.

    Returns:
        `LearnedBitModel` or, for a Sequential model without `activations`,
        `LearnedBitSequential`. Print its attribute `conversion` to see what was converted, what
        was not, and why.

    Raises:
        ValueError: The model is not built; there is nothing to convert; a pattern or class in
            `include` or `exclude` meets no layer; a layer to convert has integer weights or
            LoRA; a layer is shared between models in a way that Keras cannot copy; `activations`
            are asked for of a model with a `call` of its own; a weight is NaN or infinite; layers
            share weights in a way that a copy loses; or the copy predicts something else.

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
        32 weights (69.6%) with learned bits, 14 (30.4%) left float
    """
    if not isinstance(model, keras.Model):
        raise ValueError(f"`to_learned_bits` needs a Keras model. Received: model={model!r}")
    if not model.built or not model.weights:
        raise ValueError(
            "`to_learned_bits` needs a built model: call it on data first, or give it an Input. "
            f"Received: model={model.name!r}, built={model.built}"
        )
    if isinstance(model, keras.Sequential) and not hasattr(model, "inputs"):
        raise ValueError(
            "A Sequential model must have one symbolic input, as from `keras.Input`. "
            f"Received: model={model.name!r}"
        )
    check_number("bits", bits)
    settings = {
        "bits": bits,
        "min_bits": min_bits,
        "max_bits": max(8, math.ceil(bits)) if max_bits is None else max_bits,
        "kernel_quantizer": kernel_quantizer,
    }
    check_bits(bits, min_bits, settings["max_bits"])
    if activations not in (False, None) and not is_graph(model):
        raise ValueError(
            "`activations` are quantized in Sequential and functional models; in a `call` of your "
            f"own use `LearnedBitActivation`. Received: model={model.name!r}"
        )
    make_activation = _make_activation(activations)
    check_finite_weights(model, "`to_learned_bits`")
    selection = Selection(model, include, exclude)
    copier = _ToLearnedBits(selection, settings, make_activation, copies_layers=copy)
    converted = copier.copy(model)
    not_compared = check_conversion(model, converted, x) if copy else None
    converted.conversion = copier.report(converted, [*left_behind(model), not_compared])
    return converted


def _make_activation(activations):
    """Function of `name` and `dtype` to a `LearnedBitActivation`; None for none."""
    if activations in (False, None):
        return None
    settings = {} if activations is True else activations
    if not isinstance(settings, dict) or {"name", "dtype"} & settings.keys():
        raise ValueError(
            "`activations` must be True, False, or a dictionary of settings of "
            "`LearnedBitActivation` without `name` and `dtype`. "
            f"Received: activations={activations!r}"
        )
    return functools.partial(LearnedBitActivation, **settings)


class _ToLearnedBits(Copier):
    """Puts learned-bit layers in the place of those that a selection wants.

    Args:
        selection: `Selection`.
        settings: Dictionary of settings of the learned-bit layers.
        make_activation: Function of a name to the layer to put before each, or None.
    """

    functional = LearnedBitModel
    sequential = LearnedBitSequential

    def __init__(self, selection, settings, make_activation, copies_layers):
        super().__init__(copies_layers)
        self.selection = selection
        self.settings = settings
        self.make_activation = make_activation
        self.conversions = {}
        self.converted = set()
        self.activations = []
        self.names = {layer.name for layer in selection.names}
        self.quantized = {}  # `id` of a tensor to itself and what takes its place

    def rewires(self, model):
        return self.make_activation is not None

    def call(self, layer, *args, **kwargs):
        if self.make_activation and layer in self.converted:
            args, kwargs = keras.tree.map_structure(
                lambda value: self._quantized(value, layer), (args, kwargs)
            )
        outputs = layer(*args, **kwargs)
        if isinstance(layer, LearnedBitActivation):
            self.quantized[id(outputs)] = outputs, outputs
        return outputs

    def _quantized(self, value, layer):
        """What a converted layer is called with in the place of a value."""
        is_float = isinstance(value, keras.KerasTensor) and "float" in value.dtype
        if not is_float or any(value is given for given in keras.tree.flatten(self.inputs)):
            return value
        if id(value) not in self.quantized:
            activation = self.make_activation(name=self._free_name(layer), dtype=value.dtype)
            self.activations.append(activation)
            self.quantized[id(value)] = value, activation(value)
        return self.quantized[id(value)][1]

    def _free_name(self, layer):
        name = base = f"{layer.name}_input"
        for number in itertools.count(1):
            if name not in self.names:
                self.names.add(name)
                return name
            name = f"{base}_{number}"

    def layer(self, layer):
        wanted = [each for each in layers_inside(layer) if self.selection.wants(each)]
        if not wanted:
            return self.like(layer)
        twin = self._twin(layer)
        if twin is not None:
            self.conversions[layer] = type(twin).__name__
            self.converted.add(twin)
            return twin
        self.conversions |= dict.fromkeys(wanted, f"in LearnedBitWrapper {layer.name!r}")
        unwanted = [
            number
            for number, (chain, _, _) in enumerate(kernels_inside(layer))
            if (chain[-1] if chain else layer) not in wanted
        ]
        new = LearnedBitWrapper(self.like(layer), exclude=unwanted, **self.settings)
        self.converted.add(new)
        return new

    def _twin(self, layer):
        """A learned-bit layer in the place of one of Keras's; None where there is none."""
        if type(layer) not in TWINS:
            return None
        try:
            return from_config(TWINS[type(layer)], layer, self.settings)
        except ValueError:
            if self.copies_layers:
                raise
            return None  # it has a function that cannot be copied, and is wrapped as it is

    def holder(self, model):
        wrapper = self.layer(model)
        if wrapper.layer is not model:
            build_like(model, wrapper.layer)
        wrapper.build()
        # TensorFlow's outermost scopes, and so the names of models in training, begin otherwise.
        return LearnedBitSubclassed(wrapper, name=model.name.lstrip("_") or None)

    def fill(self, old, new):
        if isinstance(new, LearnedBitSubclassed):
            new = new.wrapper
        if isinstance(new, OwnsBits) and not isinstance(old, OwnsBits):
            if isinstance(new, LearnedBitWrapper):
                self.copy_state(old, new.layer)
            else:
                with keeping_scales():
                    assign_all(float_weights(new), old.weights)
            for kernel in new.quantized_kernels.values():
                kernel.fit_scale()
        elif not is_graph(old):
            self.copy_state(old, new)

    def report(self, converted, notes):
        kernels = quantized_kernels(converted)
        learned = sum(kernel.size for kernel in kernels)
        total = sum(math.prod(v.shape) for v in float_weights(converted))
        notes = [note for note in notes if note]
        return self.selection.report(self.conversions, self.activations, (learned, total), notes)
