"""`to_keras`: converts a learned-bit model to plain Keras layers."""

import keras

from keras_learnbits._keras import is_mixed, reserve_names, set_dtype_policy
from keras_learnbits.conversion.copying import build_copy, copy_model, copy_state, weight_pairs
from keras_learnbits.layers.activation import OPERATIONS, LearnedBitActivation
from keras_learnbits.layers.base import OwnsBits
from keras_learnbits.layers.discovery import quantized_kernels
from keras_learnbits.layers.float_weights import assign_all
from keras_learnbits.layers.layer_copy import copy_layer, dtype_setting
from keras_learnbits.layers.traversal import layers_inside
from keras_learnbits.layers.wrapper import LearnedBitWrapper
from keras_learnbits.training.model import LearnedBitSubclassed

LEARNED_BIT_LAYERS = OwnsBits, LearnedBitActivation


def to_keras(model, float32=False):
    """A copy of the model in plain Keras layers with the quantized weights.

    It makes the model's predictions, and can be loaded without this library.

    Args:
        model: A built Keras model with learned-bit layers.
        float32: Whether layers with a mixed precision compute in float32 in the new model.

    Returns:
        A new Keras model, not compiled: Sequential, functional, or of the class that was
        converted. A Sequential model with a `LearnedBitActivation` becomes a functional one, in
        which operations of `keras.ops` replace that layer.

    Raises:
        ValueError: The model is not built or has no learned-bit layer; or a
            `LearnedBitActivation` has not seen training data yet, or passes on a mask, which
            `keras.ops` do not.

    Examples:
        >>> model = keras_learnbits.LearnedBitSequential(
        ...     [keras.Input((8,)), keras_learnbits.LearnedBitDense(2, bits=1)])
        >>> plain = to_keras(model)
        >>> type(plain.layers[0]).__name__, len(np.unique(plain.layers[0].kernel))
        ('Dense', 4)
    """
    return plain_copy(model, float32)[0]


def plain_copy(model, float32=False, activation_twin=None):
    """`to_keras`, which also returns the copy of each weight.

    Args:
        model: A built Keras model with learned-bit layers.
        float32: Whether layers with a mixed precision compute in float32 in the new model.
        activation_twin: Function of a `LearnedBitActivation` to the layer or function that
            replaces it; by default its `plain_twin`.

    Returns:
        The plain model, and a dictionary of the `id` of each weight of the model, except
        bit-widths and scales, to the weight of the plain model.

    Raises:
        ValueError: The model cannot be converted, for the reasons of `to_keras`.
    """
    if not isinstance(model, keras.Model) or not model.built or not quantized_kernels(model):
        raise ValueError(
            "`to_keras` needs a built Keras model with at least one learned-bit layer. "
            f"Received: model={model!r}"
        )

    def replace_layer(layer):
        if isinstance(layer, LearnedBitSubclassed):
            layer = layer.wrapper
        if activation_twin is not None and isinstance(layer, LearnedBitActivation):
            return activation_twin(layer)
        if isinstance(layer, LEARNED_BIT_LAYERS):
            return layer.plain_twin(float32)  # of an activation it is a function
        return copy_layer(layer, **dtype_setting(layer, float32))

    layers = layers_inside(model)
    if any(isinstance(layer, LearnedBitActivation) for layer in layers):
        # Operations of `keras.ops` in a graph are not among its layers.
        operations = [each for layer in layers for each in getattr(layer, "operations", [])]
        reserve_names([each.name for each in (*layers, *operations)], OPERATIONS)
    plain, copies = copy_model(model, replace_layer, _plain_subclassed, _copy_weights)
    # The model itself, and layers inside layers, have taken their policies from the configuration.
    for layer in layers_inside(plain) if float32 else ():
        if is_mixed(layer):
            set_dtype_policy(layer, "float32")
    left = [layer.name for layer in layers_inside(plain) if isinstance(layer, LEARNED_BIT_LAYERS)]
    if left:
        raise ValueError(
            "`to_keras` replaces the learned-bit layers of a model, but not those that you put "
            f"inside other layers. Received: model={model.name!r}, with {left} inside"
        )
    return plain, {id(weight): copy for weight, copy in weight_pairs(copies)}


def _plain_subclassed(model):
    """The plain copy of a model with a custom `call`, without its quantized weights."""
    if not isinstance(model, LearnedBitSubclassed):
        raise ValueError(
            "`to_keras` converts a model with a custom `call` only if `to_learned_bits` made it, "
            f"because it cannot replace layers in other `call`s. Received: model={model.name!r}"
        )
    plain = model.wrapper.plain_twin()
    build_copy(model.wrapper.layer, plain)
    return plain


def _copy_weights(layer, plain):
    """Copies weights for `copy_model`: the quantized ones of learned-bit layers."""
    if isinstance(layer, LearnedBitSubclassed):
        layer = layer.wrapper
    if not isinstance(layer, OwnsBits):
        return copy_state(layer, plain)
    is_wrapper = isinstance(layer, LearnedBitWrapper)
    copies = copy_state(layer.layer, plain) if is_wrapper else {}
    assign_all(plain.weights, layer.plain_weights())
    return copies
