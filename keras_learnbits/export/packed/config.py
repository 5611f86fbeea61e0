"""The configuration in a packed file, and checks that it makes the same model."""

import functools
import json
import pathlib
import tempfile

import keras
import numpy as np

from keras_learnbits._keras import has_assets, own_state
from keras_learnbits.export._check import difference, examples, largest
from keras_learnbits.export._function import input_signature_of, predictions_of
from keras_learnbits.export._weights import layer_paths
from keras_learnbits.export.packed import weights
from keras_learnbits.layers.traversal import layers_inside

# Layers with a vocabulary, which is not a weight: Keras saves it in a separate file.
VOCABULARIES = (
    keras.layers.TextVectorization,
    keras.layers.StringLookup,
    keras.layers.IntegerLookup,
)
# Largest accepted difference between predictions of the model and of its copy, relative to the
# largest prediction: a unit in the last place of bfloat16. Weights are equal, or for
# `MinMaxQuantizer` equal up to rounding.
TOLERANCE = 2.0**-7


def model_config(model):
    """The configuration of a model, for `keras.models.model_from_json`.

    It has vocabularies as arguments of their layers, and no compile settings.

    Args:
        model: A built Keras model.

    Raises:
        ValueError: The model has no `get_config`.
    """
    try:
        config = json.loads(model.to_json())
    except (NotImplementedError, TypeError) as error:
        raise ValueError(
            "`include_config=True` needs a model with a `get_config`. "
            f"Received: model={model.name!r}, {error}"
        ) from error
    config.pop("compile_config", None)
    for layer in _vocabulary_layers(model):
        for entry in _entries(config, layer.name):
            entry.update(_vocabulary(layer))
    return config


def _vocabulary_layers(model):
    return [layer for layer in layers_inside(model) if isinstance(layer, VOCABULARIES)]


def _vocabulary(layer):
    """The arguments that give a new layer the vocabulary of a layer, for JSON."""
    words = [word if isinstance(word, str) else int(word) for word in layer.get_vocabulary()]
    # Some layers have frequencies of the words as state, padded to the size of the output.
    state = own_state(layer).items()
    settings = {name: np.asarray(array)[: len(words)].tolist() for name, array in state}
    return {"vocabulary": words, **settings}


def _entries(config, name):
    """Yields the settings of all layers with a given name anywhere in a configuration."""
    left = [config]
    while left:
        value = left.pop()
        if isinstance(value, list):
            left += value
        elif isinstance(value, dict):
            left += value.values()
            settings = value.get("config")
            if (
                "class_name" in value
                and isinstance(settings, dict)
                and settings.get("name") == name
            ):
                yield settings


def check_vocabularies(model, config):
    """Raises a ValueError if a vocabulary of a model differs from the one in a packed file.

    Args:
        model: A built Keras model that gets the weights of the file.
        config: Configuration in the file, or None.
    """
    for layer, path in layer_paths(model).items():
        if isinstance(layer, VOCABULARIES):
            kept = [each.get("vocabulary") for each in _entries(config, layer.name)]
            own = _vocabulary(layer)["vocabulary"]
            if kept and own not in kept:
                raise ValueError(
                    "A model that weights are loaded into must have the vocabulary that they were "
                    "trained with: call `set_vocabulary`, or `load_packed_model`. Received: layer "
                    f"{path!r} of model {model.name!r}, with {len(own)} words, others than the file"
                )


def check_without_config(model):
    """Raises a ValueError if a model has state other than weights, such as a vocabulary.

    Args:
        model: A built Keras model.
    """
    for layer, path in layer_paths(model).items():
        files = _assets(layer)
        if files:
            raise ValueError(
                "A packed file has weights only, unless it has the model's configuration, which "
                "includes vocabularies: set `include_config=True`. "
                f"Received: layer {path!r} of model {model.name!r}, which keeps {sorted(files)}"
            )


def _assets(layer):
    """State of a layer other than weights: dictionary of the name of a file to its bytes."""
    if not has_assets(layer):
        return {}
    with tempfile.TemporaryDirectory() as directory:
        layer.save_assets(directory)
        return {path.name: path.read_bytes() for path in pathlib.Path(directory).iterdir()}


def model_of(file, custom_objects=None):
    """The model of a packed file, with its weights.

    Args:
        file: `reader.PackedFile` with a configuration.
        custom_objects: Dictionary of name to class or function that Keras does not know.

    Raises:
        ValueError: Keras cannot make or build the model, or the model has other weights.
    """
    model = keras.models.model_from_json(json.dumps(file.config), custom_objects)
    weights.fill(model, file.weights)
    return model


def check_config(model, file):
    """Raises a ValueError if the configuration of a packed file makes a different model.

    Weights that two layers share may be separate in the new model, layers may not be built by their
    configuration, or may have state that is neither in the configuration nor in the weights.

    Args:
        model: The model that was packed.
        file: `reader.PackedFile` that was read from its file.
    """
    # With weights in float32 even if those of the file are bfloat16, to compare predictions.
    exact = file._replace(weights=weights.packed_weights(model, "float32"))
    # As if the user gave all custom classes to `load_packed_model`.
    classes = {type(layer).__name__: type(layer) for layer in layers_inside(model)}
    cause = None
    try:
        fault = _difference(model, model_of(exact, classes))
    except Exception as error:  # classes of users may raise anything
        fault, cause = f"{type(error).__name__}: {error}", error
    if fault:
        raise ValueError(
            "`include_config=True` needs a model that its configuration makes again: of registered "
            "classes and functions, with no weight that two layers share, and vocabularies in "
            "layers of different names. Save it without the configuration, and load it with "
            "`load_packed(path, into=model)`. "
            f"Received: model={model.name!r}, {fault}"
        ) from cause


def _difference(model, made):
    """A description of how a model made from a file differs from the packed one, or None."""
    made_paths = layer_paths(made)
    by_path = {path: layer for layer, path in made_paths.items()}
    # Layers that a class makes without names have other automatic names, but the same order.
    for (layer, path), other in zip(layer_paths(model).items(), made_paths, strict=True):
        state = _vocabulary if isinstance(layer, VOCABULARIES) else _assets
        if state(layer) != state(by_path.get(path, other)):
            return f"whose layer {path!r} has state that is not a weight and would be lost"
    try:
        signature = input_signature_of(model)
    except ValueError:
        return None
    predict = functools.partial(predictions_of, model, signature)
    for inputs, expected in examples(model, keras.tree.flatten(signature), predict):
        for one, other in zip(expected, predictions_of(made, signature, inputs), strict=True):
            fault = difference(other, one, TOLERANCE * largest(one))
            if fault:
                return f"whose copy has an output {fault}"
    return None
