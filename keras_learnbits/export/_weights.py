"""Names of a model's weights, and a check that all are finite; for all writers of files."""

import itertools

import numpy as np

from keras_learnbits._keras import is_hidden_graph, is_unnamed_weight
from keras_learnbits.layers.discovery import free_name, quantized_kernels
from keras_learnbits.layers.traversal import layers_inside
from keras_learnbits.layers.wrapper import LearnedBitWrapper
from keras_learnbits.training.model import LearnedBitSubclassed


def layer_paths(model):
    """A unique path of each layer of a model: names of the layers that lead to it, joined by `/`.

    Layers of one name inside one layer are numbered. A `LearnedBitWrapper` has the path of the
    layer around it, so that paths are the same as in the plain Keras copy.

    Args:
        model: A built Keras model.

    Returns:
        Dictionary of layer to path; the path of the model is empty.
    """
    root = model.wrapper.layer if isinstance(model, LearnedBitSubclassed) else model
    paths, taken = {root: ""}, set()
    for layer, chain in layers_inside(root).items():
        holder = (root, *chain)[-2] if chain else None
        if holder in paths and not is_hidden_graph(layer, holder):
            name = "/".join(filter(None, [paths[holder], layer.name]))
            wrapper = isinstance(layer, LearnedBitWrapper)
            paths[layer] = paths[holder] if wrapper else free_name(name, taken)
    return paths


def weight_names(model):
    """Unique names of a model's weights: the path of the layer, then the name of the weight.

    `variable.path` is the scope in which a weight was created: it may repeat, and differs in a copy
    of the model. These names depend only on the tree of layers, so a model made from the same
    configuration has the same ones. Weights without a name are numbered within their layer.

    Args:
        model: A built Keras model.

    Returns:
        Dictionary of the `id` of each weight to its name.

    Examples:
        >>> model = keras.Sequential(
        ...     [keras.Input((4,)), keras_learnbits.LearnedBitDense(2, name="dense")])
        >>> list(weight_names(model).values())
        ['dense/kernel', 'dense/log_scale', 'dense/bias', 'dense/bits']
    """
    paths = layer_paths(model)
    owners = {}
    for layer in paths:  # `layer.weights` includes the weights of layers inside
        held = {id(v) for each in layers_inside(layer) if each is not layer for v in each.weights}
        for variable in layer.weights:
            if id(variable) not in held:
                owners.setdefault(id(variable), layer)
    names, taken = {}, set()
    numbers = {layer: itertools.count() for layer in paths}
    root = next(iter(paths))
    for variable in model.weights:
        layer = owners.get(id(variable), root)
        number = next(numbers[layer])
        own_name = f"weight_{number}" if is_unnamed_weight(variable.name) else variable.name
        name = "/".join(filter(None, [paths[layer], own_name]))
        names[id(variable)] = free_name(name, taken)
    return names


def check_finite(model):
    """Raises a ValueError if a weight of a model is NaN or infinite.

    A runtime would compute with it silently, or fail far from its origin.

    Args:
        model: A built Keras model.
    """
    names = weight_names(model)
    weights = [(v, v.numpy()) for v in model.weights if "float" in v.dtype]
    # Finite kernels and scales may give infinite levels, and infinite kernels finite levels.
    weights += [(each.kernel, each.quantized().numpy()) for each in quantized_kernels(model)]
    for variable, array in weights:
        with np.errstate(over="ignore"):
            faulty = int(np.sum(~np.isfinite(array.astype("float32"))))
        if faulty:
            raise ValueError(
                "Weights must be finite to be written to a file; train with a lower learning rate, "
                f"or take an earlier checkpoint. Received: model={model.name!r}, with {faulty} of "
                f"{array.size} values of {names[id(variable)]!r} NaN or infinite"
            )
