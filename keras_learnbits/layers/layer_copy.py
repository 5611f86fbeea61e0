"""Copies of single layers, made from their configurations."""

import inspect

import keras

from keras_learnbits._keras import is_mixed, set_dtype_policy

# Every `get_config` returns these keys (keras/src/layers/layer.py), even if the `__init__` of a
# custom layer does not accept them.
BASE_SETTINGS = ("name", "trainable", "dtype")


def copy_layer(layer, layer_class=None, **settings):
    """A new, unbuilt layer with the configuration of another one.

    Args:
        layer: `keras.layers.Layer`.
        layer_class: Class of the new layer; by default that of `layer`.
        **settings: Entries that replace entries of the configuration, or are added to it.

    Raises:
        ValueError: The class cannot make a layer from the configuration.

    Examples:
        >>> copy_layer(keras.layers.Dense(3, name="head"), units=5).get_config()["units"]
        5
    """
    try:
        # Some classes put layers into their configuration without serializing them. The original
        # and its copy would share these layers.
        config = _with_copied_layers({**layer.get_config(), **settings})
        return _layer_from_config(layer_class or type(layer), config)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(
            "A layer can be copied if its class can be made from its `get_config`. Functions in "
            "the configuration must be registered with `keras.saving`; lambdas cannot be. "
            "`copy=False` takes such layers without copying them. "
            f"Received: {layer.name!r} of class {type(layer).__name__}, {error}"
        ) from error


def dtype_setting(layer, float32):
    """Settings for `copy_layer` that make a copy compute in float32.

    Args:
        layer: `keras.layers.Layer`.
        float32: Whether the copy of a layer with a mixed precision computes in float32.

    Returns:
        Dictionary with the key `"dtype"`; empty if the precision does not change.
    """
    return {"dtype": "float32"} if float32 and is_mixed(layer) else {}


def _with_copied_layers(value):
    """A configuration, or a value in it, with copies of the layers in it."""
    if isinstance(value, keras.layers.Layer):
        return copy_layer(value)
    if isinstance(value, dict):
        return {key: _with_copied_layers(each) for key, each in value.items()}
    if isinstance(value, list):  # also the list class of Keras that tracks its items
        return [_with_copied_layers(each) for each in value]
    return tuple(map(_with_copied_layers, value)) if type(value) is tuple else value


def _layer_from_config(layer_class, config):
    """`from_config`, also for classes whose `__init__` does not accept `name`, `dtype`, ..."""
    parameters = inspect.signature(layer_class.__init__).parameters.values()
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return layer_class.from_config(config)
    named = {each.name for each in parameters}
    missing = [name for name in BASE_SETTINGS if name in config and name not in named]
    values = {name: config.pop(name) for name in missing}
    layer = layer_class.from_config(config)
    for name, value in values.items():
        if name == "dtype":
            set_dtype_policy(layer, value)
        else:
            setattr(layer, name, value)
    return layer
