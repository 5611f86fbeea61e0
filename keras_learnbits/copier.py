"""`Copier`: models copied layer by layer, as conversion needs."""

import functools
import tempfile

import keras

from keras_learnbits.layers import wrapper
from keras_learnbits.layers.inside import layers_inside
from keras_learnbits.layers.tensors import float_weights, quantized_kernels
from keras_learnbits.model import KerasFunctional


class Copier:
    """Copies a model: graphs of layers are built anew, a subclass says what becomes of a layer.

    Each layer is called as in the original, unless the subclass has a `call`.

    Attributes:
        copies: Dictionary of layer to its copy. A layer that is shared is copied once.
        inputs: Those of the outermost model's copy.
    """

    functional = keras.Model
    sequential = keras.Sequential

    def __init__(self):
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
        if taken:
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
            if not is_graph(old):
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
        for kind in (keras.Sequential, KerasFunctional)
    )


def like(layer):
    """A layer of the same configuration, not built."""
    return from_config(type(layer), layer)


def from_config(layer_class, layer, settings=None):
    """A layer of a class with the configuration of another layer, and settings beside it."""
    try:
        return layer_class.from_config({**layer.get_config(), **(settings or {})})
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(
            "A layer can be copied if its class can be made from its `get_config`; functions in it "
            "must be registered with `keras.saving`, and lambdas cannot be. "
            f"Received: {layer.name!r} of class {type(layer).__name__}, {error}"
        ) from error


def build_like(model, copied):
    """Builds the copy of a model with a `call` of its own."""
    if not wrapper.build_like(copied, model.get_build_config()):
        unbuilt = [layer.name for layer in layers_inside(copied) if not layer.built]
        raise ValueError(
            "A model with a `call` of its own can be converted if its `build_from_config` builds "
            "all its layers from what its `get_build_config` returns. "
            f"Received: model={model.name!r}, whose copy has unbuilt layers {unbuilt}"
        )
