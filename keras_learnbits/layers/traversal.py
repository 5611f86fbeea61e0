"""The layers inside a layer, and the kernels inside them."""

import keras

from keras_learnbits.layers.base import OwnsBits
from keras_learnbits.layers.twins import kernels_of


def layers_inside(layer):
    """A layer and all layers that it holds, each once, a holder before what it holds.

    Args:
        layer: `keras.layers.Layer`, also a model.

    Returns:
        Dictionary of layer to the tuple of layers that lead to it, itself last; without `layer`,
        whose own tuple is empty.

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
        if isinstance(holder, keras.Model):
            visit(holder.layers, chain)
        for value in list(vars(holder).values()):
            visit(value, chain)

    walk(layer, ())
    return found


def finalize_inside(model):
    """Has layers compute with what they were given: `Normalization` keeps copies of its weights."""
    for layer in layers_inside(model):
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()


def kernels_inside(layer):
    """The kernels of a layer and of all layers that it holds, but those that learn their bits.

    Returns:
        List of the layers that lead to the kernel's (without `layer`), the name of the weight,
        and its `QuantizedWeight`.
    """
    return [
        (chain, weight_name, weight)
        for each, chain in layers_inside(layer).items()
        if not any(isinstance(holder, OwnsBits) for holder in chain)
        for weight_name, weight in kernels_of(each).items()
    ]


def path_of(chain):
    """Names of the layers that lead to a layer, joined by `/`."""
    return "/".join(layer.name for layer in chain)
