"""The configuration in a packed file, and whether it makes the model again."""

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

# Layers whose vocabulary is not a weight: Keras saves it in a separate file.
VOCABULARIES = (
    keras.layers.TextVectorization,
    keras.layers.StringLookup,
    keras.layers.IntegerLookup,
)
# How far predictions of the model and of its copy may be apart, of the largest: a unit in the last
# place of bfloat16. Their weights are equal, or some are a rounding apart (`MinMaxQuantizer`).
TOLERANCE = 2.0**-7


def model_config(model):
    """What `keras.models.model_from_json` makes a model from, not compiled.

    Vocabularies are in it as if the layers had been made with them.

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
    """The settings that make a layer with the vocabulary of another, as JSON has them."""
    words = [word if isinstance(word, str) else int(word) for word in layer.get_vocabulary()]
    # The state are frequencies, where the layer has some. Those after the words pad the output.
    state = own_state(layer).items()
    settings = {name: np.asarray(array)[: len(words)].tolist() for name, array in state}
    return {"vocabulary": words, **settings}


def _entries(config, name):
    """The settings of all layers of a name, wherever they are in a configuration."""
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
    """Raises a ValueError if a vocabulary of a model is not the one in a packed file.

    Args:
        model: A built Keras model that gets the weights of the file.
        config: The configuration in the file, or None.
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
    """Raises a ValueError if a model has a state that is no weight, as a vocabulary.

    Args:
        model: A built Keras model.
    """
    for layer, path in layer_paths(model).items():
        files = _assets(layer)
        if files:
            raise ValueError(
                "A packed file holds weights only, unless it has the model's configuration, which "
                "holds vocabularies, too: set `include_config=True`. "
                f"Received: layer {path!r} of model {model.name!r}, which keeps {sorted(files)}"
            )


def _assets(layer):
    """What a layer keeps that is no weight: dictionary of a file's name to its bytes."""
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
        ValueError: Keras cannot make or build the model, or it has other weights.
    """
    model = keras.models.model_from_json(json.dumps(file.config), custom_objects)
    weights.fill(model, file.weights)
    return model


def check_config(model, file):
    """Raises a ValueError if the model that a packed file's configuration makes is another one.

    Weights that layers share may be apart in it, layers may not be built by their configuration,
    and may have a state that is in neither.

    Args:
        model: The model that was packed.
        file: What is read from its file.
    """
    # With weights that are not rounded to bfloat16, so that predictions can be compared.
    exact = file._replace(weights=weights.packed_weights(model, "float32"))
    # What a user has to give to `load_packed_model`.
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
            "layers of different names. Save it without, and load it with "
            "`load_packed(path, into=model)`. "
            f"Received: model={model.name!r}, {fault}"
        ) from cause


def _difference(model, made):
    """In what a model that is made from a file differs from the packed one; None if in nothing."""
    made_paths = layer_paths(made)
    by_path = {path: layer for layer, path in made_paths.items()}
    # Layers that a class makes without names have other ones, but come in the same order.
    for (layer, path), other in zip(layer_paths(model).items(), made_paths, strict=True):
        state = _vocabulary if isinstance(layer, VOCABULARIES) else _assets
        if state(layer) != state(by_path.get(path, other)):
            return f"whose layer {path!r} has a state that is no weight, and would lose it"
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
