import keras
import numpy as np
import pytest
from thorough import thorough

import keras_learnbits as klb


def model_of(weights, log_scale=None, **arguments):
    """A model of one layer `broken` with given weights."""
    weights = np.asarray(weights, "float32")
    layer = klb.LearnedBitDense(weights.shape[1], name="broken", **arguments)
    model = klb.LearnedBitSequential([keras.Input((len(weights),)), layer])
    kernel = layer.quantized_kernels["kernel"]
    kernel.kernel.assign(weights)
    kernel.fit_scale()
    if log_scale is not None:
        kernel.log_scale.assign(np.full(kernel.log_scale.shape, log_scale))
    model.compile(keras.optimizers.SGD(0.0), "mse", bit_optimizer=klb.SignSGD(0.0))
    return model


def fit(model, guard, epochs=1):
    x = np.ones((4, model.input_shape[1]))
    y = np.ones((4, model.output_shape[1]))
    return model.fit(x, y, epochs=epochs, callbacks=[guard], verbose=0)


HEALTHY = np.random.default_rng(0).normal(size=(30, 4))


@pytest.mark.parametrize(
    ("weights", "log_scale", "finding", "message"),
    [
        (np.ones((30, 4)), None, "one level", "'broken' rounds all its weights to one level of 4"),
        (HEALTHY, -5.0, "saturated", "'broken' has .* of its weights beyond its grid at 2 bits"),
        (HEALTHY, 3.0, "error", "'broken' has a relative quantization error of .* at 2 bits"),
    ],
    ids=["one level", "saturated", "error"],
)
def test_a_broken_layer_is_named(weights, log_scale, finding, message):
    guard = klb.CollapseGuard(max_error=0.75 if finding == "error" else 1e9)
    with pytest.warns(UserWarning, match=message):
        fit(model_of(weights, log_scale, bits=2), guard)
    assert (-1, "broken", finding) in guard.findings


@pytest.mark.parametrize("bits", [4, *thorough(1, 8)])
def test_a_healthy_layer_is_not(bits):
    guard = klb.CollapseGuard()
    fit(model_of(HEALTHY, bits=bits), guard)  # warnings are errors here
    assert guard.findings == []


@pytest.mark.parametrize(("bits", "bound"), [(1, "lowest"), *thorough((8, "highest"))])
def test_a_layer_at_its_bound_is_named_on_request(bits, bound):
    guard = klb.CollapseGuard(bounds=True)
    with pytest.warns(UserWarning, match=f"'broken' is at its {bound} bit-width"):
        fit(model_of(HEALTHY, bits=bits), guard)


def test_a_finding_is_warned_of_once_and_listed_each_time():
    guard = klb.CollapseGuard()
    with pytest.warns(UserWarning, match="one level") as caught:
        fit(model_of(np.ones((30, 4))), guard, epochs=2)
    assert len([w for w in caught if "one level" in str(w.message)]) == 1
    assert [f[0] for f in guard.findings if f[2] == "one level"] == [-1, 0, 1]


@pytest.mark.thorough
def test_bits_are_raised_on_request_but_not_when_frozen():
    model = model_of(HEALTHY, 3.0, bits=2)
    with pytest.warns(UserWarning, match="error"):
        fit(model, klb.CollapseGuard("raise_bits"))
    assert float(model.layers[0].bits) == 4  # before training, and after the epoch
    model = model_of(HEALTHY, 3.0, bits=2)
    model.freeze_bits()
    with pytest.warns(UserWarning, match="error"):
        fit(model, klb.CollapseGuard("raise_bits"))
    assert float(model.layers[0].bits) == 2


def test_bits_of_frozen_layers_are_not_raised():
    model = model_of(HEALTHY, 3.0, bits=2)
    model.layers[0].trainable = False
    guard = klb.CollapseGuard("raise_bits")
    guard.set_model(model)
    with pytest.warns(UserWarning, match="error"):
        guard.on_epoch_end(0)
    assert float(model.layers[0].bits) == 2


def test_training_is_stopped_on_request():
    with pytest.warns(UserWarning, match="error"):
        history = fit(model_of(HEALTHY, 3.0, bits=2), klb.CollapseGuard("stop"), epochs=5)
    assert len(history.epoch) == 1


def test_an_unknown_action_is_refused():
    with pytest.raises(ValueError, match="`action` must be one of .*'warn'"):
        klb.CollapseGuard("typo")
