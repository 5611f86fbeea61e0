"""The layers inside a layer, and the kernels inside them."""

import keras

from keras_learnbits.layers.base import OwnsBits
from keras_learnbits.layers.twins import kernels_of


def layers_inside(layer):
    """A layer and all layers inside it, each once, and each before the layers inside it.

    Args:
        layer: `keras.layers.Layer`, also a model.

    Returns:
        Dictionary of layer to the tuple of layers on the way from `layer` to it, which ends with
        itself. The tuple of `layer` is empty.

    Examples:
        >>> layer = keras.layers.TimeDistributed(keras.layers.Dense(3, name="dense"))
        >>> [path_of(chain) for chain in layers_inside(layer).values()]
        ['', 'dense']
    """
    found, seen = {layer: ()}, set()

    def visit(value, chain):
        if isinstance(value, keras.layers.Layer):
            if value not in found:
                found[value] = (*chain, value)
                walk(value, found[value])
        elif isinstance(value, dict | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            for each in value.values() if isinstance(value, dict) else value:
                visit(each, chain)

    def walk(holder, chain):
        # A model's `layers` are in the order of its graph, attributes in the order of assignment.
        if isinstance(holder, keras.Model):
            visit(holder.layers, chain)
        for value in list(vars(holder).values()):
            visit(value, chain)

    walk(layer, ())
    return found


def finalize_inside(model):
    """Makes layers use weights that were assigned to them."""
    # `Normalization` computes with copies of its mean and variance, which it makes in
    # `finalize_state` (keras/src/layers/preprocessing/normalization.py).
    for layer in layers_inside(model):
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()


def kernels_inside(layer):
    """The kernels of a layer and of all layers inside, except those of learned-bit layers.

    Returns:
        List of tuples: the layers on the way from `layer` to the kernel's layer, the name of the
        weight, and its `QuantizedWeight`.
    """
    return [
        (chain, weight_name, weight)
        for each, chain in layers_inside(layer).items()
        if not any(isinstance(holder, OwnsBits) for holder in chain)
        for weight_name, weight in kernels_of(each).items()
    ]


def path_of(chain):
    """Path of a layer: the names of a chain of layers, joined by `/`."""
    return "/".join(layer.name for layer in chain)
