"""Models traced by alkaid, whose interpreter runs the circuit, compared with the models."""

import keras
import numpy as np
import pytest

import keras_learnbits as klb

alkaid = pytest.importorskip("alkaid.converter")
L = keras.layers
RNG = np.random.default_rng(0)


def quantized():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((6, 6, 2)), L.Conv2D(4, 3, activation="relu"), L.ZeroPadding2D(1),
         L.MaxPooling2D(2), L.Flatten(), L.Dense(3)]
    )  # fmt: skip
    x = RNG.normal(size=(64, 6, 6, 2)).astype("float32")
    return klb.quantize(
        model, x, target_bits=3, activations={"bits": 5}, power_of_two=True, steps=0, verbose=0
    )


def traced(model, inputs_kif):
    from alkaid.trace import trace

    return trace(*alkaid.trace_model(model, inputs_kif=inputs_kif))


def test_alkaid_traces_what_the_model_predicts():
    model = quantized()
    # Inputs of 12 fractional bits, as the port of a circuit has; some beyond the quantizer's range.
    x = np.floor(RNG.normal(0, 2, (200, 6, 6, 2)) * 4096) / 4096
    circuit = traced(klb.to_fixed_point(model), inputs_kif=(1, 4, 12))
    found = circuit.predict(x.reshape(200, -1))
    np.testing.assert_array_equal(found, model.predict(x.astype("float32"), verbose=0))


def test_the_fixed_point_model_is_saved_and_loaded_for_alkaid(tmp_path):
    model = quantized()
    x = RNG.normal(size=(8, 6, 6, 2)).astype("float32")
    klb.to_fixed_point(model).save(tmp_path / "circuit.keras")
    loaded = keras.models.load_model(tmp_path / "circuit.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
