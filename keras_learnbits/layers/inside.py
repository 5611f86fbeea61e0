"""What lies inside a layer: the layers that it holds, and their kernels."""

import keras
import numpy as np

from keras_learnbits.layers import convolutional, core
from keras_learnbits.layers.base import OwnsBits, QuantizedWeight, keras_twin

LEARNED_BIT_LAYERS = (
    core.LearnedBitDense,
    core.LearnedBitEinsumDense,
    core.LearnedBitEmbedding,
    convolutional.LearnedBitConv1D,
    convolutional.LearnedBitConv2D,
    convolutional.LearnedBitConv3D,
    convolutional.LearnedBitConv1DTranspose,
    convolutional.LearnedBitConv2DTranspose,
    convolutional.LearnedBitConv3DTranspose,
    convolutional.LearnedBitDepthwiseConv1D,
    convolutional.LearnedBitDepthwiseConv2D,
    convolutional.LearnedBitSeparableConv1D,
    convolutional.LearnedBitSeparableConv2D,
)
TWINS = {keras_twin(layer): layer for layer in LEARNED_BIT_LAYERS}
CELLS = (keras.layers.LSTMCell, keras.layers.GRUCell, keras.layers.SimpleRNNCell)
PER_UNIT = QuantizedWeight(output_axes=(-1,))
# Kernels of the Keras layers that have some: weight names and their output axes.
KERNELS = {
    **{layer: twin.quantized_weights for layer, twin in TWINS.items()},
    **{cell: {"kernel": PER_UNIT, "recurrent_kernel": PER_UNIT} for cell in CELLS},
}


def kernels_of(layer):
    """Weight names of a Keras layer's own kernels, and their `QuantizedWeight`s.

    Returns:
        Dictionary; empty if the layer has none, or quantizes them itself.

    Examples:
        >>> list(kernels_of(keras.layers.GRUCell(3)))
        ['kernel', 'recurrent_kernel']
    """
    if isinstance(layer, OwnsBits):
        return {}
    kernels = next((KERNELS[base] for base in type(layer).__mro__ if base in KERNELS), {})
    if isinstance(layer, keras.layers.ReversibleEmbedding) and not layer.tie_weights:
        return {**kernels, "reverse_embeddings": PER_UNIT}
    return kernels


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


def check_kernels(model, kernels):
    """Raises a ValueError if a model that is to learn bits has no kernel for it."""
    if not kernels:
        raise ValueError(
            "A LearnedBitModel needs at least one learned-bit kernel, as of LearnedBitDense. "
            f"Received: layers={[layer.name for layer in model.layers]}"
        )


def check_holders(model):
    """Raises a ValueError if a model holds a learned-bit layer where it cannot be trained."""
    for layer in layers_inside(model):
        spectral = isinstance(layer, keras.layers.SpectralNormalization)
        if spectral and isinstance(layer.layer, OwnsBits):
            raise ValueError(
                "`SpectralNormalization` changes the kernel of its layer in every step, and works "
                "with float ones only; have it hold the Keras layer. "
                f"Received: {layer.name!r}, which holds {layer.layer.name!r}"
            )


def check_finite_weights(model, purpose):
    """Raises a ValueError if a weight of a model is NaN or infinite, with the name of its layer.

    Args:
        model: A Keras model or layer.
        purpose: What needs the weights, the subject of the message's sentence.
    """
    names, inside = {}, layers_inside(model)
    # Holders first, so that the layer that a weight belongs to names it.
    for layer in sorted(inside, key=lambda layer: not isinstance(layer, keras.Model)):
        chain = inside[layer]
        names |= dict.fromkeys((id(weight) for weight in layer.weights), path_of(chain))
    bad = [
        f"`{weight.name}` of layer {names[id(weight)]!r}"
        for weight in model.weights
        if "float" in weight.dtype and not np.isfinite(np.asarray(weight, "float32")).all()
    ]
    if bad:
        raise ValueError(
            f"{purpose} needs weights that are numbers; load or train them again. "
            f"Received: NaN or infinity in {', '.join(bad)}"
        )


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


class _MaskProbe(keras.layers.Layer):
    """Tells whether what it is called with has a mask."""

    def __init__(self):
        super().__init__()
        self.supports_masking = True

    def call(self, inputs, mask=None):
        self.masked = mask is not None
        return inputs


def is_masked(tensor):
    """Whether a symbolic tensor carries a mask."""
    probe = _MaskProbe()
    probe(tensor)
    return probe.masked
