"""The code of docs/extending.md runs, and its classes behave as documented."""

import pathlib
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_learnbits as klb

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "extending.md"


@pytest.fixture(scope="module")
def page():
    """The names that the page's code has defined, once it has run."""
    names = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)), names)
    return names


def test_a_custom_target_is_met_and_used_up(page):
    rows = klb.bit_table(page["model"]).rows
    per_byte = {1: 8, 2: 4, 3: 2, 4: 2, 5: 1, 6: 1, 7: 1, 8: 1}
    assert sum(-(-row.weights // per_byte[row.bits]) for row in rows) <= 200
    assert {row.bits for row in rows} != {1}


def test_a_custom_quantizer_with_scales_is_fitted_saved_and_packed(page, tmp_path):
    model, x = page["model"], page["x"]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.layers[0].kernel_quantizer == page["MidTreadQuantizer"]()
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    klb.save_packed(model, tmp_path / "model.safetensors")
    arrays = klb.load_packed(tmp_path / "model.safetensors")
    for layer in model.layers:
        quantized = layer.quantized_kernels["kernel"].quantized()
        np.testing.assert_array_equal(arrays[f"{layer.name}/kernel"], quantized)
    plain = keras.Sequential([keras.Input((16,)), keras.layers.Dense(8)])
    converted = klb.to_learned_bits(plain, bits=4, kernel_quantizer=page["MidTreadQuantizer"]())
    kernel = converted.layers[0].quantized_kernels["kernel"]
    fitted = float(kernel.squared_error())
    for factor in (0.8, 1.25):
        kernel.log_scale.assign_add(tf.fill(kernel.log_scale.shape, np.log(factor)))
        assert float(kernel.squared_error()) > fitted
        kernel.log_scale.assign_sub(tf.fill(kernel.log_scale.shape, np.log(factor)))


def test_a_custom_price_and_estimator_move_bits_and_are_saved(page, tmp_path):
    def bits_after(bit_reg):
        layers = [keras.Input((16,)), klb.LearnedBitDense(4, bits=5)]
        model = klb.LearnedBitSequential(layers)
        settings = {"bit_gradient": page["ErrorOnly"](), "bit_penalty": page["quadratic"]}
        optimizer = klb.SignSGD(0.5)
        model.compile("adam", "mse", bit_optimizer=optimizer, bit_reg=bit_reg, **settings)
        x = page["x"]
        model.fit(x, x[:, :4], epochs=2, verbose=0)
        return float(model.layers[0].bits), model

    assert bits_after(0.0)[0] > 5
    bits, model = bits_after(10.0)
    assert bits < 5
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(loaded.optimizer.bit_gradient, page["ErrorOnly"])
    x = tf.constant(page["x"])
    assert loaded.evaluate(x, x[:, :4], verbose=0) == pytest.approx(
        model.evaluate(x, x[:, :4], verbose=0), rel=1e-6
    )
    assert loaded.bit_settings["bit_penalty"] is page["quadratic"]


def test_a_target_that_is_none_is_refused():
    with pytest.raises(ValueError, match="as `target` an instance of `keras_learnbits.callbacks.T"):
        klb.BitBudget(target=3)
