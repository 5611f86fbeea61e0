"""Files of version 0.1.0, from before its modules moved, load and can be trained further."""

import pathlib

import keras
import numpy as np
import pytest

import keras_learnbits as klb

FILES = pathlib.Path(__file__).parent / "data" / "0.1.0"
NAMES = ["sequential", "functional", "converted"]


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_of_0_1_0_predicts_what_it_did_and_trains_on(name):
    known = np.load(FILES / f"{name}.npz")
    model = keras.models.load_model(FILES / f"{name}.keras")
    np.testing.assert_allclose(model.predict(known["x"], verbose=0), known["y"], rtol=1e-5)
    bits = [float(tensor.latent_bits()) for tensor in model.quantized_tensors]
    np.testing.assert_array_equal(bits, known["bits"])
    assert float(model.bit_reg.value) == pytest.approx(known["bit_reg"])
    assert model.bits_are_frozen == known["frozen"]
    steps = int(model.optimizer.iterations)
    assert np.isfinite(model.fit(known["x"], known["y"], verbose=0).history["loss"]).all()
    assert int(model.optimizer.iterations) == steps + 1


def test_a_saved_model_of_0_1_0_keeps_how_it_was_compiled():
    model = keras.models.load_model(FILES / "sequential.keras")
    optimizer = model.optimizer
    assert optimizer.bit_gradient.get_config()["interval"] == 3
    assert optimizer.bit_optimizer.get_config()["momentum"] == 0.5
    # Three epochs of four steps, a decision every three steps, are in the estimator's state.
    assert float(optimizer.bit_gradient.steps.value) == 12
    assert int(optimizer.iterations) == 12


@pytest.mark.parametrize("name", NAMES)
def test_a_packed_file_of_0_1_0_predicts_what_the_model_did(name):
    known = np.load(FILES / f"{name}.npz")
    model = klb.load_packed_model(FILES / f"{name}.safetensors")
    np.testing.assert_allclose(model.predict(known["x"], verbose=0), known["y"], rtol=1e-5)
