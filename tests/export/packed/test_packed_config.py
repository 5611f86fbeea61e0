"""Models made from the configuration in packed files: vocabularies, tied layers, custom classes."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from packing import assert_same_bits, disturb
from thorough import thorough

import keras_learnbits as klb
from keras_learnbits.export.packed import (
    PackedFileError,
    load_packed,
    load_packed_model,
    reader,
    save_packed,
)

L = keras.layers


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def adapted(layer, words):
    layer.adapt(words)
    return layer


def text_model(**settings):
    text = L.TextVectorization(max_tokens=10, name="text", **settings)
    text.adapt(["a good film", "a bad film"])
    rest = [L.Dense(2)]
    if settings.get("output_mode", "int") == "int":
        rest = [L.Embedding(10, 4), L.GlobalAveragePooling1D(), L.Dense(2)]
    return klb.to_learned_bits(keras.Sequential([keras.Input((), dtype="string"), text, *rest]))


def lookup_model(layer, dtype):
    layers = [keras.Input((3,), dtype=dtype), layer, L.Embedding(9, 2), L.Flatten(), L.Dense(2)]
    return klb.to_learned_bits(keras.Sequential(layers))


VOCABULARIES = {
    "text": lambda: (text_model(output_sequence_length=4), ["a film", "so bad"]),
    "counts": lambda: (text_model(output_mode="count", pad_to_max_tokens=True), ["a film film"]),
    "frequencies": lambda: (
        text_model(output_mode="tf_idf"), ["a film", "bad bad"]
    ),
    "words": lambda: (
        lookup_model(adapted(L.StringLookup(num_oov_indices=2), ["b", "a", "b"]), "string"),
        [["a", "b", "zzz"]],
    ),
    "integers": lambda: (
        lookup_model(adapted(L.IntegerLookup(), [7, 7, 2**40, 3]), "int64"), [[7, 2**40, 5]]
    ),
    "given": lambda: (
        lookup_model(L.StringLookup(vocabulary=["b", "a"], name="given"), "string"),
        [["a", "b", "zzz"]],
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "which", ["text", "given", *thorough("counts", "frequencies", "words", "integers")]
)
@pytest.mark.filterwarnings("ignore")
def test_vocabularies_are_kept_in_the_configuration(which, path):
    model, given = VOCABULARIES[which]()
    disturb(model)
    save_packed(model, path, include_config=True)
    given = tf.constant(given, model.inputs[0].dtype)
    assert_same_bits(np.asarray(load_packed_model(path)(given)), np.asarray(model(given)))


@pytest.mark.filterwarnings("ignore")
def test_a_vocabulary_is_refused_where_there_is_no_configuration(path):
    model, _ = VOCABULARIES["text"]()
    with pytest.raises(ValueError, match=r"include_config=True.*layer 'text' .*vocabulary\.txt"):
        save_packed(model, path)
    assert not path.exists()
    model, given = VOCABULARIES["given"]()  # given by the program that makes the model
    save_packed(model, path)
    other, _ = VOCABULARIES["given"]()
    load_packed(path, into=other)
    given = tf.constant(given)
    assert_same_bits(np.asarray(other(given)), np.asarray(model(given)))


@pytest.mark.filterwarnings("ignore")
def test_a_model_with_another_vocabulary_is_not_filled(path):
    save_packed(text_model(output_sequence_length=4), path, include_config=True)
    load_packed(path, into=text_model(output_sequence_length=4))
    other = text_model(output_sequence_length=4)
    other.layers[0].set_vocabulary(["", "[UNK]", "film"])
    with pytest.raises(ValueError, match="must have the vocabulary.*layer 'text' of model"):
        load_packed(path, into=other)


@pytest.mark.filterwarnings("ignore")
def test_vocabularies_of_layers_with_one_name_are_refused_where_they_differ(path):
    inputs, ends = keras.Input((1,), dtype="string"), []
    for name, words in (("left", ["a", "b"]), ("right", ["c", "a"])):
        lookup = adapted(L.StringLookup(output_mode="multi_hot", name="lookup"), words)
        layers = [keras.Input((1,), dtype="string"), lookup, L.Dense(2, name="fc")]
        ends.append(keras.Sequential(layers, name=name)(inputs))
    model = klb.to_learned_bits(keras.Model(inputs, L.Add()(ends)))
    with pytest.raises(ValueError, match="layers of different names.*layer '(left|right)/lookup'"):
        save_packed(model, path, include_config=True)
    assert not path.exists()


@keras.saving.register_keras_serializable("test_packed_config")
class Tied(L.Layer):
    """Computes with the weights of another layer, of which its configuration has a copy."""

    def __init__(self, source, **kwargs):
        super().__init__(**kwargs)
        self.source = source

    def call(self, x):
        return x @ keras.ops.transpose(self.source.kernel)

    def get_config(self):
        source = keras.saving.serialize_keras_object(self.source)
        return {**super().get_config(), "source": source}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config.pop("source")), **config)


def tied():
    inputs, source = keras.Input((4,)), L.Dense(3, name="source")
    x = klb.LearnedBitDense(3, name="middle")(source(inputs))
    return klb.LearnedBitModel(inputs, Tied(source, name="tied")(x))


@keras.saving.register_keras_serializable("test_packed_config")
class Forgetful(L.Layer):
    """A layer whose configuration lacks a value that it computes with."""

    def __init__(self, factor=1.0, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor

    def call(self, x):
        return x * self.factor

    def get_config(self):
        return super().get_config()


def with_layer(layer):
    return klb.LearnedBitSequential([keras.Input((4,)), klb.LearnedBitDense(4), layer])


REFUSED = {
    "tied layers": (tied, "as many weights as the file"),
    "a layer that loses a setting": (
        lambda: with_layer(Forgetful(3.0)), "whose copy has an output off by"
    ),
    "a lambda": (lambda: with_layer(L.Lambda(lambda x: x * 2)), "Python lambda"),
    "a function that is not registered": (
        lambda: with_layer(L.Activation(lambda x: x**2)), "Received: model='learned_bit_sequential"
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*includes a `lambda`:UserWarning")
@pytest.mark.parametrize("which", REFUSED)
def test_a_model_that_its_configuration_does_not_make_again_is_refused(which, path):
    make, message = REFUSED[which]
    model = make()
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=f"(?s)that its configuration makes again.*{message}"):
        save_packed(model, path, include_config=True)
    assert path.read_bytes() == b"old"
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_model_with_tied_layers_is_saved_without_and_fills_its_like(path):
    model, other = tied(), tied()
    disturb(model)
    save_packed(model, path)
    load_packed(path, into=other)
    x = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")
    assert_same_bits(np.asarray(other(x)), np.asarray(model(x)))


def test_floats_that_are_halved_do_not_make_the_copy_another_model(path):
    inputs = x = keras.Input((4,))
    for _ in range(12):
        x = L.LayerNormalization()(klb.LearnedBitDense(16, bits=2, activation="relu")(x))
    model = klb.LearnedBitModel(inputs, x)
    disturb(model)
    save_packed(model, path, float_dtype="bfloat16", include_config=True)
    assert load_packed_model(path).count_params() == model.count_params()


def test_a_file_without_configuration_still_says_so(path):
    save_packed(tied(), path)
    with pytest.raises(PackedFileError, match=re.escape(str(path))):
        load_packed_model(path)
    assert reader.read_packed(path).config is None
