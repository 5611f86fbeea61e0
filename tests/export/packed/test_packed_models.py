"""Models of every kind that are packed, filled and made again; and those that are refused."""

import os

import keras
import numpy as np
import pytest
from packing import assert_same_bits, assert_same_predictions, disturb, quantized_arrays
from thorough import thorough

import keras_learnbits as klb
from keras_learnbits.export.packed import load_packed, load_packed_model, save_packed

L = keras.layers


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def nested():
    inner = keras.Sequential([keras.Input((4,)), klb.LearnedBitDense(4, bits=2, name="inner")])
    inputs = keras.Input((4,))
    shared = klb.LearnedBitDense(4, bits=3, name="shared")
    return klb.LearnedBitModel(inputs, shared(inner(shared(inputs))))


class Subclassed(klb.LearnedBitModel):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first, self.second = klb.LearnedBitDense(4, bits=2), L.Dense(2)

    def call(self, x):
        return self.second(self.first(x))


def subclassed():
    model = Subclassed()
    model(np.ones((1, 4)))
    return model


def converted():
    layers = [keras.Input((4,)), L.Dense(5, activation="relu"), L.Dropout(0.5), L.Dense(2)]
    return klb.to_learned_bits(keras.Sequential(layers), bits=3)


@pytest.mark.parametrize("make", [nested, *thorough(subclassed, converted)])
def test_models_of_every_kind_fill_one_another_and_are_made_again(make, path):
    x = np.random.default_rng(0).normal(size=(5, 4))
    model, other = make(), make()
    disturb(model)
    save_packed(model, path, include_config=True)
    load_packed(path, into=other)
    made = load_packed_model(path, custom_objects={"Subclassed": Subclassed})
    expected = model.predict(x, verbose=0)
    assert_same_bits(other.predict(x, verbose=0), expected)
    assert_same_bits(made.predict(x, verbose=0), expected)


def test_learned_ranges_of_activations_come_back_in_full_precision(path):
    def make():
        layers = [klb.LearnedBitDense(4, bits=2), klb.LearnedBitActivation(bits=3)]
        return klb.LearnedBitSequential([keras.Input((4,)), *layers])

    model, other = make(), make()
    x = np.random.default_rng(0).normal(size=(50, 4)).astype("float32")
    model(x, training=True)
    save_packed(model, path, float_dtype="bfloat16", include_config=True)
    load_packed(path, into=other)
    for each in (other, load_packed_model(path)):
        assert_same_bits(each(x).numpy(), model(x).numpy())


def test_a_shared_layer_is_stored_once(path):
    save_packed(nested(), path)
    names = ["shared/kernel", "shared/bias", "inner/kernel", "inner/bias"]
    assert [name.rpartition("sequential/")[2] for name in load_packed(path)] == names


def test_layers_of_the_same_name_stay_apart(path):
    class Twice(klb.LearnedBitModel):
        def __init__(self):
            super().__init__()
            self.parts = [klb.LearnedBitDense(3, name="same") for _ in range(2)]

        def call(self, x):
            return self.parts[1](self.parts[0](x))

    model, other = Twice(), Twice()
    for each in (model, other):
        each(np.ones((1, 3)))
    disturb(model)
    save_packed(model, path)
    names = list(load_packed(path, into=other))
    assert len(names) == len(set(names)) == 4
    assert_same_bits(model(np.ones((2, 3))).numpy(), other(np.ones((2, 3))).numpy())


def test_plain_layers_get_the_quantized_weights(path):
    model = converted()
    disturb(model)
    plain = klb.to_keras(model)
    for variable in plain.weights:
        variable.assign(variable * 0)
    save_packed(model, path)
    load_packed(path, into=plain)
    x = np.random.default_rng(0).normal(size=(5, 4))
    np.testing.assert_allclose(
        plain.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-5, atol=1e-6
    )
    assert_same_bits(plain.layers[0].kernel.numpy(), quantized_arrays(model)[0])


def test_weights_are_matched_by_name_where_names_agree(path):
    def make(first, second):
        inputs = keras.Input((4,))
        branches = {name: klb.LearnedBitDense(4, name=name)(inputs) for name in (first, second)}
        return klb.LearnedBitModel(inputs, [branches["a"], branches["b"]])

    model, other = make("a", "b"), make("b", "a")
    disturb(model)
    save_packed(model, path)
    load_packed(path, into=other)
    assert_same_predictions(model, other)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", *thorough("mixed_float16", "bfloat16")])
def test_models_of_half_precision_come_back(policy, path):
    keras.config.set_dtype_policy(policy)
    model, other = converted(), converted()
    save_packed(model, path, include_config=True)
    load_packed(path, into=other)
    for each in (other, load_packed_model(path)):
        for ours, theirs in zip(quantized_arrays(model), quantized_arrays(each), strict=True):
            assert_same_bits(ours, theirs)


def test_a_trained_model_comes_back_without_its_optimizer(data, make_model, path):
    model = make_model(bits=4)
    model.compile("adam", "mse", bit_reg=0.1)
    model.fit(*data, verbose=0)
    save_packed(model, path, include_config=True)
    assert_same_predictions(model, load_packed_model(path))
    assert len(load_packed(path)) == 4


def dense(units=2, name="dense", **settings):
    layer = klb.LearnedBitDense(units, name=name, **settings)
    return klb.LearnedBitSequential([keras.Input((4,)), layer])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dense(3), "must have the weights of the file"),
        (lambda: dense(use_bias=False), "as many weights as the file. Received: 1 in"),
        (lambda: dense(bits=2, max_bits=2), "3 bits in the file, 1 to 2 of"),
        (lambda: dense(kernel_quantizer="min_max"), "must be able to quantize its kernels"),
        (
            lambda: dense(kernel_quantizer=klb.LearnedScaleQuantizer(per_channel=False)),
            "must be able to quantize its kernels",
        ),
        (lambda: keras.Sequential([L.Dense(2)]), "as many weights as the file. Received: 0 in"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_and_keeps_its_weights(make, message, path):
    model = dense(bits=3)
    disturb(model)
    save_packed(model, path)
    other = make()
    before = [variable.numpy() for variable in other.weights]
    with pytest.raises(ValueError, match=message):
        load_packed(path, into=other)
    for variable, value in zip(other.weights, before, strict=True):
        np.testing.assert_array_equal(variable, value)


def test_what_the_file_does_not_quantize_does_not_go_into_a_quantized_layer(path):
    def make(second):
        return klb.LearnedBitSequential([keras.Input((4,)), klb.LearnedBitDense(4), second(4)])

    save_packed(make(L.Dense), path)
    with pytest.raises(ValueError, match="Kernels that the model quantizes must be quantized"):
        load_packed(path, into=make(klb.LearnedBitDense))


def test_a_kernel_whose_type_cannot_hold_the_levels_is_refused(path):
    save_packed(dense(bits=14, max_bits=16), path)
    with pytest.raises(ValueError, match="of bfloat16 with LearnedScaleQuantizer"):
        load_packed(path, into=dense(dtype="bfloat16", max_bits=16))


def wrapped_twice():
    layer = L.Dense(3)
    layer.build((None, 3))
    inputs = keras.Input((3,))
    once = klb.LearnedBitWrapper(layer, name="a")(inputs)
    return keras.Model(inputs, klb.LearnedBitWrapper(layer, name="b")(once))


def with_nan():
    model = dense()
    model.layers[0].quantized_kernels["kernel"].kernel.assign(np.full((4, 2), np.nan))
    return model


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lambda: keras.Sequential([keras.Input((4,)), L.Dense(2)]), {}, "at least one learned-bit"),
        (lambda: klb.LearnedBitSequential([klb.LearnedBitDense(2)]), {}, "needs a built Keras"),
        (lambda: klb.LearnedBitDense(2), {}, "needs a built Keras model"),
        (dense, {"float_dtype": "float16"}, "`float_dtype` must be one of .* Received: .*float16"),
        (wrapped_twice, {}, "each kernel at one bit-width"),
        (with_nan, {}, "must be finite"),
    ],
)
def test_what_cannot_be_packed_is_refused_and_no_file_is_left(make, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_packed(make(), tmp_path / "model.safetensors", **arguments)
    assert os.listdir(tmp_path) == []


def test_a_model_without_config_is_packed_without(path):
    class NoConfig(Subclassed):
        def __init__(self, units):
            super().__init__()

    model = NoConfig(3)
    model(np.ones((1, 4)))
    save_packed(model, path)
    with pytest.raises(ValueError, match="`include_config=True` needs a model with a `get_config`"):
        save_packed(model, path, include_config=True)
    with pytest.raises(ValueError, match=f"include_config=True.*Received: path='{path}'"):
        load_packed_model(path)


def test_one_scale_in_the_file_fills_all_channels_of_a_model(path):
    model = dense(bits=3, kernel_quantizer=klb.LearnedScaleQuantizer(per_channel=False))
    other = dense()
    disturb(model)
    save_packed(model, path)
    load_packed(path, into=other)
    assert_same_bits(quantized_arrays(model)[0], quantized_arrays(other)[0])


@pytest.mark.parametrize("make_anew", [True, False])
def test_an_adapted_normalization_comes_back(make_anew, path):
    def make(adapt):
        norm = L.Normalization(name="norm")
        if adapt:
            norm.adapt(x)
        layers = [keras.Input((4,)), norm, klb.LearnedBitDense(2, bits=4, name="head")]
        return klb.LearnedBitSequential(layers)

    x = np.random.default_rng(0).normal(3.0, 5.0, (64, 4)).astype("float32")
    model = make(adapt=True)
    save_packed(model, path, include_config=True)
    if make_anew:
        loaded = load_packed_model(path)
    else:
        loaded = make(adapt=False)
        load_packed(path, into=loaded)
    np.testing.assert_allclose(loaded(x), model(x), rtol=1e-6)
