"""Checks of models that are to learn bits or be written to files."""

import keras
import numpy as np

from keras_learnbits.layers.base import OwnsBits
from keras_learnbits.layers.traversal import layers_inside, path_of


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
