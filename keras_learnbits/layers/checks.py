"""Checks of models before they learn bits or are written to files."""

import keras
import numpy as np

from keras_learnbits.layers.base import OwnsBits
from keras_learnbits.layers.traversal import layers_inside, path_of


def check_kernels(model, kernels):
    """Raises a ValueError if a model has no quantized kernel."""
    if not kernels:
        raise ValueError(
            "A LearnedBitModel needs at least one learned-bit kernel, e.g. of LearnedBitDense. "
            f"Received: layers={[layer.name for layer in model.layers]}"
        )


def check_holders(model):
    """Raises a ValueError if a layer of a model prevents a learned-bit layer from training."""
    for layer in layers_inside(model):
        spectral = isinstance(layer, keras.layers.SpectralNormalization)
        if spectral and isinstance(layer.layer, OwnsBits):
            raise ValueError(
                "`SpectralNormalization` changes the kernel of its layer in every step, and works "
                "with float kernels only; give it the Keras layer. "
                f"Received: {layer.name!r}, which holds {layer.layer.name!r}"
            )


def check_finite_weights(model, purpose):
    """Raises a ValueError if a weight of a model is NaN or infinite, with the name of its layer.

    Args:
        model: A Keras model or layer.
        purpose: String, the operation that needs the weights; the message begins with it.
    """
    names, inside = {}, layers_inside(model)
    # Models first: a layer in them overwrites the path of its weights with a more precise one.
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
            f"{purpose} needs finite weights; load or train them again. "
            f"Received: NaN or infinity in {', '.join(bad)}"
        )


class _MaskProbe(keras.layers.Layer):
    """Notes whether Keras passes it a mask along with its input."""

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


def check_built(model, function):
    """Raises a ValueError unless a model is built and has weights.

    Args:
        model: A Keras model.
        function: Name of the function that needs it, for the error.
    """
    if not model.built:
        raise ValueError(
            f"`{function}` needs a built model: call it on data first, or give it an Input. "
            f"Received: model={model.name!r}, built=False"
        )
    if not model.weights:
        raise ValueError(
            f"`{function}` needs a model with weights. Received: model={model.name!r}, without any"
        )
