"""`to_learned_bits` and `to_keras`: a whole model, there and back."""

import math
import tempfile

import keras

from keras_learnbits.layers.base import (
    LearnedBitMixin,
    OwnsBits,
    check_bits,
    keras_twin,
    quantized_kernels,
)
from keras_learnbits.layers.inside import TWINS, kernels_inside, layers_inside
from keras_learnbits.layers.wrapper import LearnedBitWrapper, build_like
from keras_learnbits.model import (
    KerasFunctional,
    LearnedBitModel,
    LearnedBitSequential,
    LearnedBitSubclassed,
)
from keras_learnbits.selection import Selection
from keras_learnbits.warm_start import assign_all, float_weights


def to_learned_bits(
    model,
    include=None,
    exclude=None,
    *,
    bits=8,
    min_bits=1,
    max_bits=None,
    kernel_quantizer="learned_scale",
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
            `train_step`, are left behind.
        include: Which layers to convert; all by default. A pattern of names or paths
            (`"block1/*"`), as `fnmatch` takes it, a layer class, a function of a layer to
            whether it is meant, or a list of these.
        exclude: Which not, likewise; before `include`.
        bits: Bit-width to start at.
        min_bits: Lowest bit-width.
        max_bits: Highest bit-width; 8 by default, or `bits` where that is more.
        kernel_quantizer: `"learned_scale"`, `"min_max"` or a quantizer.

    Returns:
        `LearnedBitModel` or, for a Sequential model, `LearnedBitSequential`. Print its attribute
        `conversion` to see what was converted, what was not, and why.

    Raises:
        ValueError: The model is not built; there is nothing to convert; a pattern or class in
            `include` or `exclude` meets no layer; a layer to convert has integer weights or
            LoRA; a layer is shared between models in a way that Keras cannot copy.

    Example:
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
    settings = {
        "bits": bits,
        "min_bits": min_bits,
        "max_bits": max(8, math.ceil(bits)) if max_bits is None else max_bits,
        "kernel_quantizer": kernel_quantizer,
    }
    check_bits(bits, min_bits, settings["max_bits"])
    copier = _ToLearnedBits(Selection(model, include, exclude), settings)
    converted = copier.copy(model)
    converted.conversion = copier.report()
    return converted


def to_keras(model):
    """The model in plain Keras layers that hold the quantized weights.

    It predicts what the model predicts, and loads without this library.

    Args:
        model: A built Keras model with learned-bit layers.

    Returns:
        A new Keras model, not compiled: Sequential, functional, or of the class that was
        converted.

    Raises:
        ValueError: The model is not built, or has no learned-bit layer.

    Example:
    >>> model = keras_learnbits.LearnedBitSequential(
    ...     [keras.Input((8,)), keras_learnbits.LearnedBitDense(2, bits=1)])
    >>> plain = to_keras(model)
    >>> type(plain.layers[0]).__name__, len(np.unique(plain.layers[0].kernel))
    ('Dense', 4)
    """
    if not isinstance(model, keras.Model) or not model.built or not quantized_kernels(model):
        raise ValueError(
            "`to_keras` needs a built Keras model with at least one learned-bit layer. "
            f"Received: model={model!r}"
        )
    plain = _ToKeras().copy(model)
    left = [layer.name for layer in layers_inside(plain) if isinstance(layer, OwnsBits)]
    if left:
        raise ValueError(
            "`to_keras` replaces learned-bit layers of a model, not those that you put inside "
            f"other layers. Received: model={model.name!r}, with {left} inside"
        )
    return plain


class _Copier:
    """Copies a model: graphs of layers are built anew, a subclass says what becomes of a layer.

    Attributes:
        copies: Dictionary of layer to its copy. A layer that is shared is copied once.
    """

    functional = keras.Model
    sequential = keras.Sequential

    def __init__(self):
        self.copies = {}

    def copy(self, model):
        """The copy of the outermost model."""
        with keras.saving.custom_object_scope({type(each).__name__: type(each)
                                               for each in layers_inside(model)}):  # fmt: skip
            if _is_graph(model):
                new = self._graph(model, self.functional, self.sequential)
            else:
                new = self.holder(model)
            self.copies[model] = new
            for old, copied in list(self.copies.items()):
                self.fill(old, copied)
        self._copy_trainable(model)
        return new

    def layer(self, layer):
        """The copy of a layer that is no graph of layers."""
        raise NotImplementedError

    def holder(self, model):
        """The copy of an outermost model that is no graph of layers."""
        raise NotImplementedError

    def fill(self, old, new):
        """Gives a copy, built by now, the state of its original."""
        raise NotImplementedError

    def _graph(self, model, functional, sequential):
        if isinstance(model, keras.Sequential):
            given = model.inputs[0]
            inputs = _input_like(given)
            return sequential([inputs, *map(self._any, model.layers)], name=model.name)
        # Without the compiled state, which Keras would clone, too.
        bare = keras.Model(model.input, model.output, name=model.name)
        inputs = keras.tree.map_structure(_input_like, model.input)
        clone = keras.models.clone_model(bare, inputs, clone_function=self._any)
        if functional is keras.Model:
            return clone
        return functional(clone.input, clone.output, name=model.name)

    def _any(self, operation):
        if not isinstance(operation, keras.layers.Layer):
            return operation  # of `keras.ops`: it holds nothing
        if operation not in self.copies:
            if _is_graph(operation):
                copied = self._graph(operation, keras.Model, keras.Sequential)
            else:
                copied = self.layer(operation)
            self.copies[operation] = copied
        return self.copies[operation]

    def copy_state(self, old, new):
        """Copies weights, and what Keras keeps beside them, of two layers of one kind."""
        for source, target in zip(layers_inside(old), layers_inside(new), strict=True):
            if type(source) is not type(target):
                raise ValueError(
                    "Layers of one model must not be of different classes with the same name. "
                    f"Received: {type(source)} and {type(target)} for layer {source.name!r}"
                )
            store = {}
            source.save_own_variables(store)
            target.load_own_variables(store)
            if hasattr(source, "save_assets"):
                with tempfile.TemporaryDirectory() as directory:
                    source.save_assets(directory)
                    target.load_assets(directory)
            self.copies.setdefault(source, target)

    def _copy_trainable(self, model):
        """Holders first: each sets what it holds. Then each weight by itself."""
        old_layers = [layer for layer in layers_inside(model) if layer in self.copies]
        for old in sorted(old_layers, key=lambda layer: -len(layers_inside(layer))):
            self.copies[old].trainable = old.trainable
        for source, target in zip(
            float_weights(model), float_weights(self.copies[model]), strict=True
        ):
            target.trainable = source.trainable
        for kernel in quantized_kernels(self.copies[model]):
            if kernel.log_scale is not None:
                kernel.log_scale.trainable = kernel.kernel.trainable


class _ToLearnedBits(_Copier):
    """Puts learned-bit layers in the place of those that a selection wants."""

    functional = LearnedBitModel
    sequential = LearnedBitSequential

    def __init__(self, selection, settings):
        super().__init__()
        self.selection = selection
        self.settings = settings
        self.conversions = {}

    def layer(self, layer):
        wanted = [each for each in layers_inside(layer) if self.selection.wants(each)]
        if not wanted:
            return _like(layer)
        if type(layer) in TWINS:
            twin = TWINS[type(layer)]
            self.conversions[layer] = twin.__name__
            return _from_config(twin, layer, self.settings)
        self.conversions |= dict.fromkeys(wanted, f"in LearnedBitWrapper {layer.name!r}")
        unwanted = [
            number
            for number, (chain, _, _) in enumerate(kernels_inside(layer))
            if (chain[-1] if chain else layer) not in wanted
        ]
        return LearnedBitWrapper(_like(layer), exclude=unwanted, **self.settings)

    def holder(self, model):
        wrapper = self.layer(model)
        _build_like(model, wrapper.layer)
        wrapper.build()
        return LearnedBitSubclassed(wrapper, name=model.name)

    def fill(self, old, new):
        if isinstance(new, LearnedBitSubclassed):
            new = new.wrapper
        if isinstance(new, OwnsBits) and not isinstance(old, OwnsBits):
            if isinstance(new, LearnedBitWrapper):
                self.copy_state(old, new.layer)
            else:
                assign_all(float_weights(new), old.weights)
            for kernel in new.quantized_kernels.values():
                kernel.fit_scale()
        elif not _is_graph(old):
            self.copy_state(old, new)

    def report(self):
        return self.selection.report(self.conversions)


class _ToKeras(_Copier):
    """Puts plain layers with quantized weights in the place of learned-bit layers."""

    def layer(self, layer):
        if isinstance(layer, LearnedBitWrapper):
            return _like(layer.layer)
        if isinstance(layer, LearnedBitMixin):
            config = layer.get_config()
            for setting in ("bits", "min_bits", "max_bits", "kernel_quantizer"):
                del config[setting]
            return keras_twin(type(layer)).from_config(config)
        return _like(layer)

    def holder(self, model):
        if not isinstance(model, LearnedBitSubclassed):
            raise ValueError(
                "Of models with a `call` of their own, `to_keras` converts those that "
                "`to_learned_bits` made; in others it cannot replace the layers. "
                f"Received: model={model.name!r}"
            )
        plain = _like(model.wrapper.layer)
        _build_like(model.wrapper.layer, plain)
        return plain

    def fill(self, old, new):
        if isinstance(old, LearnedBitSubclassed):
            old = old.wrapper
        if isinstance(old, LearnedBitWrapper):
            self.copy_state(old.layer, new)
        elif not isinstance(old, OwnsBits):
            if not _is_graph(old):
                self.copy_state(old, new)
            return
        quantized = {id(k.kernel): k.quantized() for k in old.quantized_kernels.values()}
        weights = old.layer.weights if isinstance(old, LearnedBitWrapper) else float_weights(old)
        assign_all(new.weights, [quantized.get(id(weight), weight) for weight in weights])


def _input_like(tensor):
    return keras.Input(
        batch_shape=tensor.shape, dtype=tensor.dtype, name=tensor.name, sparse=tensor.sparse
    )


def _is_graph(layer):
    """Whether a layer is a Sequential or functional model that is called as such."""
    return any(
        isinstance(layer, kind) and type(layer).call is kind.call
        for kind in (keras.Sequential, KerasFunctional)
    )


def _like(layer):
    """A layer of the same configuration, not built."""
    return _from_config(type(layer), layer)


def _from_config(layer_class, layer, settings=None):
    """A layer of a class with the configuration of another layer, and settings beside it."""
    try:
        return layer_class.from_config({**layer.get_config(), **(settings or {})})
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(
            "A layer can be copied if its class can be made from its `get_config`; functions in it "
            "must be registered with `keras.saving`, and lambdas cannot be. "
            f"Received: {layer.name!r} of class {type(layer).__name__}, {error}"
        ) from error


def _build_like(model, copied):
    """Builds the copy of a model with a `call` of its own."""
    if not build_like(copied, model.get_build_config()):
        unbuilt = [layer.name for layer in layers_inside(copied) if not layer.built]
        raise ValueError(
            "A model with a `call` of its own can be converted if its `build_from_config` builds "
            "all its layers from what its `get_build_config` returns. "
            f"Received: model={model.name!r}, whose copy has unbuilt layers {unbuilt}"
        )
