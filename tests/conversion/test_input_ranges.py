"""Random inputs have the range for which a model's first layers are made."""

import keras
import numpy as np
import pytest

import keras_learnbits as klb
from keras_learnbits.conversion.input_ranges import first_layers, input_for

L = keras.layers


def pixels():
    """A layer that turns pixels into numbers of mean 0 and variance 1."""
    return L.Normalization(mean=[120.0, 110.0, 100.0], variance=[60.0**2, 50.0**2, 40.0**2])


class Preprocessing(keras.Model):
    """Rescales and normalizes in a custom `call`."""

    def __init__(self):
        super().__init__()
        self.rescaling = L.Rescaling(1 / 255)
        self.normalization = L.Normalization(mean=0.5, variance=0.0625)
        self.normalization.build((None, 3))  # Keras cannot build it while it traces the model
        self.head = L.Dense(2)

    def call(self, inputs):
        return self.head(self.normalization(self.rescaling(inputs)))


def sequential():
    return keras.Sequential(
        [keras.Input((8, 8, 3)), L.RandomFlip(), pixels(), L.Conv2D(2, 3), L.Flatten(), L.Dense(2)]
    )


def nested():
    inner = keras.Sequential([keras.Input((8, 8, 3)), pixels(), L.Conv2D(2, 3)])
    inputs = keras.Input((8, 8, 3))
    return keras.Model(inputs, L.Dense(2)(L.Flatten()(inner(inputs))))


def two_layers():
    inputs = keras.Input((8, 8, 3), dtype="uint8")
    x = L.Normalization(mean=0.5, variance=0.0625)(L.Rescaling(1 / 255)(inputs))
    return keras.Model(inputs, L.Dense(2)(L.Flatten()(x)))


def custom():
    model = Preprocessing()
    model(np.zeros((1, 3)))
    return model


@pytest.mark.parametrize("make", [sequential, nested, two_layers, custom])
def test_inputs_have_mean_0_and_variance_1_after_the_first_layers(make):
    model = make()
    dtype = "uint8" if make is two_layers else "float32"
    (layers,) = first_layers(model, [dtype])
    assert layers
    values = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).clip(-1, 1)
    found = input_for(values, layers, dtype)
    assert found.dtype == dtype
    for layer in layers:
        found = keras.ops.convert_to_numpy(layer(found))
    # Pixels are integers, 1 / 64 apart after rescaling and normalizing.
    np.testing.assert_allclose(found, values, atol=1 / 100 if dtype == "uint8" else 1e-4)


class Inner(keras.Model):
    """Normalizes an inner tensor, and has a layer that it never calls."""

    def __init__(self):
        super().__init__()
        self.unused = L.Normalization()
        self.hidden = L.Dense(16)
        self.normalization = L.Normalization(mean=[1.0] * 16, variance=[4.0] * 16)
        self.normalization.build((None, 16))
        self.head = L.Dense(2)

    def call(self, inputs):
        return self.head(self.normalization(self.hidden(inputs)))


@pytest.mark.filterwarnings("ignore:.*unbuilt state:UserWarning")
def test_layers_for_other_tensors_of_a_custom_call_have_no_effect():
    model = Inner()
    model(np.zeros((1, 3)))
    (layers,) = first_layers(model, ["float32"])
    values = np.random.default_rng(0).normal(size=(2, 3))
    np.testing.assert_array_equal(input_for(values, layers), values)
    assert not model.unused.built


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
def test_the_range_is_found_in_half_precision(dtype):
    layer = L.Normalization(mean=120.0, variance=60.0**2, dtype=dtype)
    layer.build((None, 1))
    found = input_for(np.array([[-1.0], [1.0]]), [layer])
    np.testing.assert_allclose(found, [[60], [180]], rtol=0.05)


def test_an_input_that_two_layers_use_keeps_its_range():
    inputs = keras.Input((3,))
    model = keras.Model(inputs, L.Add()([L.Rescaling(1 / 255)(inputs), L.Dense(3)(inputs)]))
    assert first_layers(model, ["float32"]) == [[]]


def test_each_input_has_the_range_of_its_own_layers():
    images, numbers = keras.Input((3,)), keras.Input((3,))
    rescaling = L.Rescaling(1 / 255)
    model = keras.Model([numbers, images], L.Dense(2)(L.Add()([numbers, rescaling(images)])))
    assert first_layers(model, ["float32"] * 2) == [[], [rescaling]]


def test_integers_of_a_custom_call_may_be_indices_and_keep_their_range():
    assert first_layers(custom(), ["int32"]) == [[]]


def test_inputs_span_the_range_of_the_first_quantized_activation():
    model = keras.Sequential([keras.Input((4,)), L.Dense(2)])
    images = np.random.default_rng(0).uniform(0, 255, (64, 4)).astype("float32")
    quantized = klb.quantize(model, images, target_bits=4, activations=True, steps=0, verbose=0)
    (layers,) = first_layers(quantized, ["float32"])
    found = input_for(np.array([[3.0] * 4]), layers)
    step, offset, max_code = map(float, layers[0].grid())
    np.testing.assert_allclose(found, step * (offset + max_code))
    assert 200 < found.max() < 300
