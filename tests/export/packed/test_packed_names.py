"""Weights keep their names from a model to its file to the model that is made from it."""

import keras
import numpy as np
import pytest
from packing import assert_same_bits, disturb
from thorough import thorough

import keras_learnbits as klb
from keras_learnbits.export._weights import weight_names
from keras_learnbits.export.packed import (
    load_packed,
    load_packed_model,
    save_packed,
    weights,
    writer,
)
from keras_learnbits.export.packed.matching import matched

L = keras.layers


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def branch(name, units=3):
    layers = [keras.Input((4,)), L.Dense(units, name="fc"), L.Dense(3, name="out")]
    return keras.Sequential(layers, name=name)


def equal_branches():
    inputs = keras.Input((4,))
    outputs = L.Concatenate()([branch("left")(inputs), branch("right")(inputs)])
    return klb.to_learned_bits(keras.Model(inputs, outputs))


def deep_branches():
    """The branches have layers of equal names, and hold branches of equal names."""
    inputs = keras.Input((4,))
    ends = []
    for name in ("left", "right"):
        given = keras.Input((4,))
        inner = keras.Model(
            given, L.Add()([branch("inner")(given), branch("other")(given)]), name=name
        )
        ends.append(inner(inputs))
    return klb.to_learned_bits(keras.Model(inputs, L.Add()(ends)))


@keras.saving.register_keras_serializable("test_packed_names")
class Unnamed(L.Layer):
    """Two weights without a name, and two of one name."""

    def build(self, shape):
        for index, name in enumerate([None, None, "same", "same"]):
            setattr(self, f"weight{index}", self.add_weight((shape[-1],), "normal", name=name))

    def call(self, x):
        return self.weight0 + self.weight1 * x + self.weight2 * x**2 + self.weight3 * x**3


def unnamed():
    layers = [keras.Input((4,)), Unnamed(), L.Dense(4), Unnamed(), L.Dense(2)]
    return klb.to_learned_bits(keras.Sequential(layers))


@keras.saving.register_keras_serializable("test_packed_names")
class Twins(klb.LearnedBitModel):
    """Two layers of one name in a list, and blocks that are made where the model is."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.parts = [klb.LearnedBitDense(4, name="same") for _ in range(2)]
        self.block = keras.Sequential([klb.LearnedBitDense(4), L.Dense(4)])

    def build(self, shape):
        for layer in (*self.parts, self.block):
            layer.build(shape)

    def call(self, x):
        return self.block(self.parts[1](self.parts[0](x)))


def twins():
    model = Twins()
    model(np.ones((1, 4), "float32"))
    return model


def shared():
    layer = L.Dense(4, name="shared")
    inputs = keras.Input((4,))
    return klb.to_learned_bits(keras.Model(inputs, layer(L.Dense(4, name="first")(layer(inputs)))))


def wrapped():
    inputs = keras.Input((5, 4))
    x = L.Bidirectional(L.LSTM(3, return_sequences=True), name="both")(inputs)
    x = L.MultiHeadAttention(2, 3, name="attention")(x, x)
    outputs = L.TimeDistributed(L.Dense(2, name="dense"), name="each")(x)
    return klb.to_learned_bits(keras.Model(inputs, outputs))


MAKERS = [equal_branches, deep_branches, unnamed, twins, shared, wrapped]


@pytest.mark.parametrize(
    "make", [equal_branches, twins, *thorough(deep_branches, unnamed, shared, wrapped)]
)
def test_a_model_is_made_again_and_filled_whatever_its_names(make, path):
    model = make()
    disturb(model)
    save_packed(model, path, include_config=True)
    x = normal(model)
    expected = np.asarray(model(x))
    assert_same_bits(np.asarray(load_packed_model(path)(x)), expected)
    other = make()
    load_packed(path, into=other)
    assert_same_bits(np.asarray(other(x)), expected)


def normal(model):
    """Three random examples."""
    shape = model.inputs[0].shape[1:] if hasattr(model, "inputs") else (4,)
    return np.random.default_rng(0).normal(size=(3, *shape)).astype("float32")


@pytest.mark.parametrize("make", MAKERS)
def test_names_are_the_layers_that_lead_to_a_weight_and_differ(make):
    model = make()
    names = weight_names(model)
    assert len(names) == len(set(names.values())) == len(model.weights)
    for variable in model.weights:
        own = names[id(variable)].rpartition("/")[2]
        assert own.startswith("weight_") or own.rstrip("_1") == variable.name.rstrip("_1")


def test_names_say_which_branch_a_weight_lies_in(path):
    save_packed(equal_branches(), path)
    kernels = [name for name in load_packed(path) if name.endswith("kernel")]
    assert kernels == ["left/fc/kernel", "left/out/kernel", "right/fc/kernel", "right/out/kernel"]
    save_packed(unnamed(), path)
    assert [*load_packed(path)][:4] == [
        "unnamed/weight_0", "unnamed/weight_1", "unnamed/same", "unnamed/same_1"
    ]  # fmt: skip


@pytest.mark.parametrize("make", [equal_branches, *thorough(shared, wrapped)])
def test_the_plain_copy_has_the_names_of_the_model(make, path):
    model = make()
    disturb(model)
    plain = klb.to_keras(model)
    save_packed(model, path)
    assert {*load_packed(path)} == {*weight_names(plain).values()}
    for variable in plain.weights:
        variable.assign(variable * 0)
    load_packed(path, into=plain)
    x = normal(model)
    np.testing.assert_allclose(plain(x), model(x), rtol=1e-4, atol=1e-5)


def save_with_older_names(model, path):
    """Writes a file whose names are the paths of the variables, numbered where they repeat."""
    packed = weights.packed_weights(model, "float32")
    targets = weights.model_weights(model)
    older = [
        weight._replace(name=target.older_name)
        for weight, target in zip(packed, targets, strict=True)
    ]
    path.write_bytes(writer.packed_bytes(older, "0.1.0"))


@pytest.mark.parametrize(
    "make", [equal_branches, *thorough(deep_branches, unnamed, twins, shared, wrapped)]
)
def test_files_with_the_names_of_older_ones_are_loaded(make, path):
    model, other = make(), make()
    disturb(model)
    save_with_older_names(model, path)
    load_packed(path, into=other)
    x = normal(model)
    assert_same_bits(np.asarray(other(x)), np.asarray(model(x)))


def chain(*names):
    inputs = x = keras.Input((4,))
    for name in names:
        x = klb.LearnedBitDense(4, name=name)(x)
    return klb.LearnedBitModel(inputs, x)


@pytest.mark.parametrize(
    ("packed", "filled"),
    [
        (("a", "b"), ("b", "c")),
        (("a", "b"), ("a", "c")),
        (("a", "b", "c"), ("b", "a", "d")),
        (("dense", "dense_1"), ("dense_1", "dense_2")),
        (("block_1", "head"), ("block_2", "block_1")),
    ],
)
def test_names_that_agree_in_part_are_not_matched_by_their_order(packed, filled, path):
    save_packed(chain(*packed), path)
    model = chain(*filled)
    before = [variable.numpy() for variable in model.weights]
    with pytest.raises(ValueError, match="matched by name.*that the file lacks.*the model lacks"):
        load_packed(path, into=model)
    for variable, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(variable, value)


@pytest.mark.parametrize(
    ("packed", "filled", "order"),
    [
        (("a", "b"), ("b", "a"), (1, 0)),
        (("a", "b"), ("c", "d"), (0, 1)),
        (("head", "dense_3", "dense_5"), ("head", "dense", "dense_1"), (0, 1, 2)),
        (("dense", "head"), ("head", "dense_7"), (1, 0)),
        (("dense_9", "dense_10"), ("dense_99", "dense_100"), (0, 1)),
    ],
)
def test_names_are_matched_whatever_keras_has_numbered_layers_with(packed, filled, order, path):
    model, other = chain(*packed), chain(*filled)
    disturb(model)
    save_packed(model, path)
    load_packed(path, into=other)
    for layer, index in zip(other.layers[1:], order, strict=True):
        ours, theirs = model.layers[1 + index].quantized_kernels, layer.quantized_kernels
        assert_same_bits(ours["kernel"].quantized().numpy(), theirs["kernel"].quantized().numpy())


def test_older_names_come_after_those_of_today():
    assert matched(["a/x", "b/x"], ["b/x", "a/x"], ["a/x", "b/x"]) == [1, 0]
    assert matched(["m/a/x", "m/b/x"], ["b/x", "a/x"], ["m/b/x", "m/a/x"]) == [1, 0]
    with pytest.raises(ValueError, match="and 2 more that the file lacks"):
        matched(list("abcdefg"), list("ahijklm"), list("opqrstu"))
