"""`copy_model`: copies a model layer by layer; functions decide how each layer is copied."""

import math

import keras

from keras_learnbits._keras import (
    clone,
    copy_own_state,
    is_graph,
    set_dtype_policy,
    symbolic_inputs,
)
from keras_learnbits.layers.discovery import quantized_kernels
from keras_learnbits.layers.float_weights import float_weights
from keras_learnbits.layers.traversal import layers_inside
from keras_learnbits.layers.wrapper import build_without_call


def copy_model(
    model,
    replace_layer,
    replace_model,
    copy_weights,
    *,
    call_layer=None,
    inputs=None,
    classes=(keras.Model, keras.Sequential),
    reuse_layers=False,
    same_weights=True,
):
    """Copies a model layer by layer.

    Graphs of layers, nested ones too, are rebuilt from the copies of their layers. A layer that is
    called several times is copied once. A Sequential model becomes a functional one if
    `call_layer` is given, or if a layer is replaced by a function.

    Args:
        model: A built Keras model.
        replace_layer: Function of a layer that is not a graph. It returns an unbuilt layer, a
            function to call instead of the layer, or None to leave out a layer of one input.
        replace_model: Function of the model, used if the model is not a graph. It returns the
            copy, built.
        copy_weights: Function of a layer and its copy, both built. It sets the weights of the copy
            and returns a dictionary of the layers inside to their copies.
        call_layer: Function of a copied layer and its arguments that calls the layer. By default
            the layer is called directly.
        inputs: Structure of symbolic inputs of the copy; by default `inputs_like(model)`.
        classes: Pair of classes, for the copies of functional and of Sequential models.
        reuse_layers: Whether the copy may contain layers of the original.
        same_weights: Whether the copy must have as many weights as the original. If not, layers of
            the copy may have additional weights after the copied ones.

    Returns:
        The copy, and a dictionary of layers to their copies, which includes the model.

    Raises:
        ValueError: The copy shares weights with the original, or has a different number of them.
    """
    copier = _GraphCopier(replace_layer, call_layer, reuse_layers)
    # Configurations name classes, which need not be registered.
    with keras.saving.custom_object_scope({type(each).__name__: type(each)
                                           for each in layers_inside(model)}):  # fmt: skip
        if is_graph(model):
            inputs = inputs_like(model) if inputs is None else inputs
            new = copier.copy_graph(model, inputs, *classes)
        else:
            new = replace_model(model)
        # Under mixed_float16 `compile` scales the loss, depending on the policy of the model.
        set_dtype_policy(new, model.dtype_policy)
        copies = {**copier.copies, model: new}
        _copy_all_weights(copies, copy_weights)
    _copy_trainable(model, copies, same_weights)
    _check_sharing(model, new, reuse_layers, same_weights)
    return new, copies


class _GraphCopier:
    """Copies graphs of layers; a layer that several of them contain is copied once.

    Args:
        replace_layer: Function of a layer, as for `copy_model`.
        call_layer: Function of a copied layer and its arguments, as for `copy_model`.
        reuse_layers: Whether the copy may contain layers of the original.

    Attributes:
        copies: Dictionary of layer to its copy.
    """

    def __init__(self, replace_layer, call_layer, reuse_layers):
        self.replace_layer = replace_layer
        self.call_layer = call_layer
        self.reuse_layers = reuse_layers
        self.copies = {}

    def copy_graph(self, graph, inputs, model_class, sequential_class):
        """The copy of a graph, of one of two classes, on symbolic inputs."""
        if not isinstance(graph, keras.Sequential):
            copy = clone(graph, inputs, clone_function=self._copied, call_function=self._call)
            return model_class(copy.input, copy.output, name=graph.name)
        if self.call_layer is None:
            layers = [self._copied(layer) for layer in graph.layers]
            layers = [layer for layer in layers if layer is not _left_out]
            if all(isinstance(layer, keras.layers.Layer) for layer in layers):
                return sequential_class([inputs, *layers], name=graph.name)
        outputs = inputs
        for layer in graph.layers:
            outputs = self._call(self._copied(layer), outputs)
        return model_class(inputs, outputs, name=graph.name)

    def _copied(self, operation):
        """The layer or operation that replaces one of the original graph."""
        if not isinstance(operation, keras.layers.Layer):
            return operation  # of `keras.ops`, which has no state
        if operation in self.copies:
            return self.copies[operation]
        if is_graph(operation):
            inputs = inputs_like(operation)
            copy = self.copy_graph(operation, inputs, keras.Model, keras.Sequential)
        else:
            copy = self.replace_layer(operation) or _left_out
        if isinstance(copy, keras.layers.Layer):
            self.copies[operation] = copy
        return copy

    def _call(self, operation, *args, **kwargs):
        if not self.reuse_layers:
            _check_arguments(operation, args, kwargs)
        if self.call_layer is None:
            return operation(*args, **kwargs)
        return self.call_layer(operation, *args, **kwargs)


def _left_out(inputs, **ignored):
    """The function that is called instead of a layer that is left out."""
    return inputs


def inputs_like(model):
    """New symbolic inputs with the shapes, dtypes and names of the inputs of a graph of layers."""
    return keras.tree.map_structure(
        lambda x: keras.Input(batch_shape=x.shape, dtype=x.dtype, name=x.name, sparse=x.sparse),
        symbolic_inputs(model),
    )


def copy_state(layer, copy):
    """Copies weights and all other state that Keras saves, such as vocabularies.

    Args:
        layer: `keras.layers.Layer`, not a graph of layers.
        copy: Its copy, made from the same configuration.

    Returns:
        Dictionary of the layer and all layers inside to their copies; empty if `copy` is `layer`.

    Raises:
        ValueError: The layers inside are of different classes.
    """
    if layer is copy:
        return {}
    pairs = dict(zip(layers_inside(layer), layers_inside(copy), strict=True))
    for source, target in pairs.items():
        if type(source) is not type(target):
            raise ValueError(
                "Layers of one model must not be of different classes with the same name. "
                f"Received: {type(source)} and {type(target)} for layer {source.name!r}"
            )
        copy_own_state(source, target)
    return pairs


def weight_pairs(copies, same_weights=True):
    """Pairs of each weight and its copy, without bit-widths and scales.

    They are paired layer by layer, because a graph and its copy may list layers in different order.

    Args:
        copies: Dictionary of layer to its copy, as `copy_model` returns it.
        same_weights: Whether a copy must have as many weights as its layer.
    """
    for layer, copy in copies.items():
        if layer is not copy and not is_graph(layer):
            yield from zip(float_weights(layer), float_weights(copy), strict=same_weights)


def build_copy(model, copy):
    """Builds the copy of a model with a custom `call`."""
    if not build_without_call(copy, model.get_build_config()):
        unbuilt = [layer.name for layer in layers_inside(copy) if not layer.built]
        raise ValueError(
            "A model with a custom `call` can be converted if its `build_from_config` builds all "
            "its layers from what its `get_build_config` returns. "
            f"Received: model={model.name!r}, whose copy has unbuilt layers {unbuilt}"
        )


def _check_arguments(operation, args, kwargs):
    """Raises a ValueError if a graph passes a weight to an operation: the copy would share it."""
    arguments = keras.tree.flatten((args, kwargs))
    weights = [each.path for each in arguments if isinstance(each, keras.Variable)]
    if weights:
        raise ValueError(
            "A functional model can be copied if its weights are used inside its layers only. To "
            "tie outputs to an embedding use `keras.layers.ReversibleEmbedding`, otherwise a "
            f"custom layer. Received: {operation.name!r}, called with {weights}"
        )


def _copy_all_weights(copies, copy_weights):
    """Sets the weights of all copies, and adds the layers inside them to `copies`."""
    for layer, copy in list(copies.items()):  # a list, because `copies` grows
        if layer is not copy and not is_graph(layer):
            for pair in copy_weights(layer, copy).items():
                copies.setdefault(*pair)


def _copy_trainable(model, copies, same_weights):
    """Sets `trainable` of layers, then of single weights.

    The setter of a layer also sets all layers inside it, so outer layers come first.
    """
    layers = [layer for layer in layers_inside(model) if layer in copies]
    for layer in sorted(layers, key=lambda each: -len(layers_inside(each))):
        copies[layer].trainable = layer.trainable
    for weight, copy in weight_pairs(copies, same_weights):
        copy.trainable = weight.trainable
    for kernel in quantized_kernels(copies[model]):
        if kernel.log_scale is not None:
            kernel.log_scale.trainable = kernel.kernel.trainable


def _check_sharing(model, new, reuse_layers, same_weights):
    """Raises a ValueError unless the copy shares weights only where the original does."""
    originals = set() if reuse_layers else {id(weight) for weight in model.weights}
    shared = [weight.path for weight in new.weights if id(weight) in originals]
    if shared:
        raise ValueError(
            "A copy must not share weights with the original, but `get_config` and `from_config` "
            "of its layers pass some on. With `copy=False` layers are shared on purpose. "
            f"Received: model={model.name!r}, with {shared} in both"
        )
    # Two layers that contain a third one are copied with a copy of it each.
    sizes = [sum(math.prod(v.shape) for v in float_weights(each)) for each in (model, new)]
    kernels = [id(kernel.kernel) for kernel in quantized_kernels(new)]
    if (same_weights and sizes[0] != sizes[1]) or len({*kernels}) < len(kernels):
        raise ValueError(
            "Layers that hold other layers of the model, and so share weights with them, cannot be "
            "converted: each would get its own weights, or bits. Make one layer that holds both, "
            "or use `copy=False` and exclude all layers that share weights. "
            f"Received: model={model.name!r} of {sizes[0]:,} weights, a copy of {sizes[1]:,}"
        )
