"""`Copier`: models copied layer by layer, as conversion needs."""

import functools
import inspect
import math
import tempfile

import keras

from keras_learnbits._keras import FunctionalModel
from keras_learnbits.layers import wrapper
from keras_learnbits.layers.discovery import quantized_kernels
from keras_learnbits.layers.float_weights import float_weights
from keras_learnbits.layers.traversal import layers_inside

# What Keras's own layers have in their configuration.
COMMON = ("name", "trainable", "dtype")


class Copier:
    """Copies a model: graphs of layers are built again, a subclass says what becomes of a layer.

    Each layer is called as in the original, unless the subclass has a `call`.

    Args:
        copies_layers: Whether layers that stay what they are are copied; else they are taken
            themselves, and the original is used up.

    Attributes:
        copies: Dictionary of layer to its copy. A layer that is shared is copied once.
        inputs: Those of the outermost model's copy.
    """

    functional = keras.Model
    sequential = keras.Sequential

    def __init__(self, copies_layers=True):
        self.copies_layers = copies_layers
        self.copies = {}
        self.inputs = None

    def copy(self, model):
        """The copy of the outermost model."""
        with keras.saving.custom_object_scope({type(each).__name__: type(each)
                                               for each in layers_inside(model)}):  # fmt: skip
            if is_graph(model):
                new = self.graph(model, self.functional, self.sequential)
            else:
                new = self.holder(model)
            new.dtype_policy = model.dtype_policy  # of mixed_float16, `compile` scales the loss
            self.copies[model] = new
            for old, copied in list(self.copies.items()):
                self.fill(old, copied)
        self._copy_trainable(model)
        self._check_sharing(model, new)
        return new

    def _check_sharing(self, model, new):
        """Raises a ValueError unless the copy shares weights where the original does only."""
        shared = {id(weight) for weight in model.weights} if self.copies_layers else set()
        taken = [weight.path for weight in new.weights if id(weight) in shared]
        if taken:
            raise ValueError(
                "A copy must not share weights with the original, which its layers' `get_config` "
                "and `from_config` make it do; `copy=False` uses up the original. "
                f"Received: model={model.name!r}, with {taken} in both"
            )
        sizes = [sum(math.prod(v.shape) for v in float_weights(each)) for each in (model, new)]
        kernels = [id(kernel.kernel) for kernel in quantized_kernels(new)]
        if sizes[0] != sizes[1] or len({*kernels}) < len(kernels):
            raise ValueError(
                "Layers that hold other layers of the model, and so share weights with them, "
                "cannot be converted: each would get weights, or bits, of its own. Make them from "
                "one layer that holds both, or use `copy=False` and exclude all that share. "
                f"Received: model={model.name!r} of {sizes[0]:,} weights, a copy of {sizes[1]:,}"
            )

    def like(self, layer):
        """A copy of a layer that stays what it is, or the layer itself."""
        return like(layer) if self.copies_layers else layer

    def layer(self, layer):
        """The copy of a layer that is no graph of layers."""
        raise NotImplementedError

    def holder(self, model):
        """The copy of an outermost model that is no graph of layers."""
        raise NotImplementedError

    def fill(self, old, new):
        """Gives a copy, built by now, the state of its original."""
        raise NotImplementedError

    def rewires(self, model):
        """Whether the copy of a Sequential model is to be a functional one, for its `call`s."""
        return False

    def call(self, layer, *args, **kwargs):
        """Calls the copy of a layer in a functional model."""
        return layer(*args, **kwargs)

    def graph(self, model, functional, sequential):
        stacked = isinstance(model, keras.Sequential)
        given = model.inputs[0] if stacked else model.input
        inputs = keras.tree.map_structure(_input_like, given)
        self.inputs = inputs if self.inputs is None else self.inputs
        if stacked:
            layers = map(self._any, model.layers)
            if self.rewires(model):
                outputs = functools.reduce(lambda x, layer: self.call(layer, x), layers, inputs)
                return functional(inputs, outputs, name=model.name)
            return sequential([inputs, *layers], name=model.name)
        # Without the compiled state, which Keras would clone, too.
        bare = keras.Model(model.input, model.output, name=model.name)
        clone = keras.models.clone_model(bare, inputs, self._any, call_function=self._call)
        if functional is keras.Model:
            return clone
        return functional(clone.input, clone.output, name=model.name)

    def _call(self, operation, *args, **kwargs):
        """`call`, unless a weight is an argument: the copy would share it with the original."""
        arguments = keras.tree.flatten((args, kwargs))
        taken = [each.path for each in arguments if isinstance(each, keras.Variable)]
        if taken and self.copies_layers:
            raise ValueError(
                "A functional model can be copied if its weights are used inside of its layers "
                "only. For outputs tied to an embedding take `keras.layers.ReversibleEmbedding`, "
                f"else a layer of your own. Received: {operation.name!r}, called with {taken}"
            )
        return self.call(operation, *args, **kwargs)

    def _any(self, operation):
        if not isinstance(operation, keras.layers.Layer):
            return operation  # of `keras.ops`: it holds nothing
        if operation not in self.copies:
            if is_graph(operation):
                copied = self.graph(operation, keras.Model, keras.Sequential)
            else:
                copied = self.layer(operation)
            self.copies[operation] = copied
        return self.copies[operation]

    def copy_state(self, old, new):
        """Copies weights, and what Keras keeps beside them, of two layers of one kind."""
        if old is new:
            return
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

    def weight_pairs(self):
        """Pairs of each weight, bits and scales left out, and its copy.

        Layer by layer, since a graph may list its layers in another order than its copy does.
        """
        for old, new in self.copies.items():
            if not is_graph(old) and old is not new:
                yield from zip(float_weights(old), float_weights(new), strict=True)

    def _copy_trainable(self, model):
        """Holders first: each sets what it holds. Then each weight by itself."""
        old_layers = [layer for layer in layers_inside(model) if layer in self.copies]
        for old in sorted(old_layers, key=lambda layer: -len(layers_inside(layer))):
            self.copies[old].trainable = old.trainable
        for source, target in self.weight_pairs():
            target.trainable = source.trainable
        for kernel in quantized_kernels(self.copies[model]):
            if kernel.log_scale is not None:
                kernel.log_scale.trainable = kernel.kernel.trainable


def _input_like(tensor):
    return keras.Input(
        batch_shape=tensor.shape, dtype=tensor.dtype, name=tensor.name, sparse=tensor.sparse
    )


def is_graph(layer):
    """Whether a layer is a Sequential or functional model that is called as such."""
    return any(
        isinstance(layer, kind) and type(layer).call is kind.call
        for kind in (keras.Sequential, FunctionalModel)
    )


def like(layer):
    """A layer of the same configuration, not built."""
    return from_config(type(layer), layer)


def from_config(layer_class, layer, settings=None):
    """A layer of a class with the configuration of another layer, and settings beside it.

    Layers that stand in the configuration themselves, not serialized, are copied, or the two would
    share them.
    """
    try:
        config = _with_copies({**layer.get_config(), **(settings or {})})
        return _made(layer_class, config)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(
            "A layer can be copied if its class can be made from its `get_config`; functions in it "
            "must be registered with `keras.saving`, and lambdas cannot be. Where that cannot be, "
            "`copy=False` takes the layers as they are, and uses up the original. "
            f"Received: {layer.name!r} of class {type(layer).__name__}, {error}"
        ) from error


def _with_copies(value):
    """A configuration with copies in the place of layers."""
    if isinstance(value, keras.layers.Layer):
        return like(value)
    if isinstance(value, dict):
        return {key: _with_copies(each) for key, each in value.items()}
    if isinstance(value, list):  # also Keras's own kind, which tracks what is in it
        return [_with_copies(each) for each in value]
    return tuple(map(_with_copies, value)) if type(value) is tuple else value


def _made(layer_class, config):
    """`from_config`, also where `__init__` does not take Keras's own `name`, `dtype`, ..."""
    taken = inspect.signature(layer_class.__init__).parameters.values()
    own = {each.name for each in taken}
    if any(each.kind is each.VAR_KEYWORD for each in taken):
        return layer_class.from_config(config)
    kept = {name: config.pop(name) for name in COMMON if name in config and name not in own}
    layer = layer_class.from_config(config)
    for name, value in kept.items():
        if name == "dtype":
            layer.dtype_policy = keras.dtype_policies.get(value)
        else:
            setattr(layer, name, value)
    return layer


def build_like(model, copied):
    """Builds the copy of a model with a `call` of its own."""
    if not wrapper.build_like(copied, model.get_build_config()):
        unbuilt = [layer.name for layer in layers_inside(copied) if not layer.built]
        raise ValueError(
            "A model with a `call` of its own can be converted if its `build_from_config` builds "
            "all its layers from what its `get_build_config` returns. "
            f"Received: model={model.name!r}, whose copy has unbuilt layers {unbuilt}"
        )
