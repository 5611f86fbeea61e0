"""Graphs of quantized activations in integer arithmetic, in LiteRT and in onnxruntime."""

import keras
import numpy as np
import onnxruntime
import pytest
from ai_edge_litert.interpreter import Interpreter
from export_models import with_random_weights
from thorough import thorough

import keras_learnbits as klb

L = keras.layers


def in_litert(path, x):
    predict = Interpreter(str(path)).get_signature_runner()
    ((name, _),) = predict.get_input_details().items()
    return list(predict(**{name: x}).values())


def in_onnxruntime(path, x):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})


both_formats = pytest.mark.parametrize(
    ("export", "run"),
    [(klb.export_litert, in_litert), (klb.export_onnx, in_onnxruntime)],
    ids=["litert", "onnx"],
)


def off(export, run, model, x, path):
    """Largest difference from the model's outputs, as a share of the largest output."""
    report = export(model, path, arithmetic="int8")
    outputs = keras.tree.flatten(model.predict(x, verbose=0))
    by_shape = {each.shape: each for each in run(path, x)}
    shares = [np.abs(by_shape[y.shape] - y).max() / np.abs(y).max() for y in outputs]
    return max(shares), {row[0]: row[3] for row in report.rows}


@both_formats
@pytest.mark.parametrize(
    ("first", "second", "signed"),
    [(5, 3, False), *thorough((3, 5, False), (7, 8, True), (3, 4, True))],
)
def test_activations_of_equal_steps_keep_their_ranges(first, second, signed, export, run, tmp_path):
    """Steps are powers of two; a signed activation and one of fewer bits have one zero point."""
    inputs = keras.Input((8,), name="x")
    activations = [
        klb.LearnedBitActivation(bits, power_of_two=True, name=f"levels{bits}")
        for bits in (first, second)
    ]
    x = activations[0](inputs)
    x = klb.LearnedBitDense(16, bits=4, activation=None if signed else "relu", name="hidden")(x)
    outputs = klb.LearnedBitDense(4, bits=4, name="head")(activations[1](x))
    model = with_random_weights(klb.LearnedBitModel(inputs, outputs))
    x = 20 * np.abs(np.random.default_rng(0).normal(size=(64, 8)).astype("float32"))
    model(x, training=True)  # fits the ranges
    for layer in activations:
        change = np.log(2.0 / float(layer.grid().step))
        layer.total_log_scale.assign(layer.total_log_scale + change * layer.batches_seen)
        assert float(layer.grid().step) == 2.0
    share, _ = off(export, run, model, x, tmp_path / "model")
    assert share < 0.05  # a few values are rounded to the next level, because the bias is rounded


@both_formats
@pytest.mark.parametrize("gamma", [0.0, *thorough(1e-12, 1e-5, 1e-3)])
@pytest.mark.parametrize("beta", [0.7, *thorough(0.0, 1e-9)])
def test_channels_that_a_batch_norm_multiplies_by_zero_keep_their_bias(
    gamma, beta, export, run, tmp_path
):
    net = keras.Sequential(
        [
            keras.Input((8, 8, 4)),
            L.Conv2D(16, 3, use_bias=False, name="first"),
            L.BatchNormalization(name="norm"),
            L.ReLU(),
            L.Conv2D(16, 3, activation="relu", name="second"),
            L.Flatten(),
            L.Dense(4, name="head"),
        ]
    )
    net.get_layer("norm").gamma.assign(np.repeat([gamma, 1.0], [4, 12]))
    net.get_layer("norm").beta.assign(np.full(16, beta))
    model = klb.to_learned_bits(net, bits=4, activations=True)
    x = np.random.default_rng(0).normal(size=(64, 8, 8, 4)).astype("float32")
    model(x, training=True)  # fits the ranges
    share, arithmetic = off(export, run, model, x, tmp_path / "model")
    assert share < 0.02
    assert arithmetic == dict.fromkeys(("first", "second", "head"), "int8")


@both_formats
@pytest.mark.parametrize("returned", ["pooled", *thorough("relu", "conv")])
def test_a_tensor_that_the_model_also_returns_is_not_quantized(returned, export, run, tmp_path):
    inputs = keras.Input((16, 16, 3))
    conv = L.Conv2D(16, 3)(inputs)
    relu = L.ReLU()(conv)
    pooled = L.MaxPooling2D(2)(relu)
    outputs = L.Dense(4)(L.Flatten()(L.Conv2D(8, 2)(pooled)))
    also = {"pooled": pooled, "relu": relu, "conv": conv}[returned]
    net = keras.Model(inputs, [outputs, also])
    model = klb.to_learned_bits(net, bits=4, activations={"bits": 7})
    x = np.random.default_rng(0).normal(size=(32, 16, 16, 3)).astype("float32")
    model(x, training=True)  # fits the ranges
    export(model, tmp_path / "model", arithmetic="int8")
    expected = {each.shape: each for each in model.predict(x, verbose=0)}
    for found in run(tmp_path / "model", x):
        tolerance = 1e-5 if found.shape[1:] == also.shape[1:] else 0.02
        wanted = expected[found.shape]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@both_formats
@pytest.mark.parametrize("bits", [5, *thorough(8)])
def test_a_quantized_tensor_may_be_transposed(bits, export, run, tmp_path):
    layers = [L.Dense(8, activation="relu"), L.Permute((2, 1)), L.Dense(3)]
    net = keras.Sequential([keras.Input((6, 4)), *layers])
    model = klb.to_learned_bits(net, bits=4, activations={"bits": bits})
    x = np.random.default_rng(0).normal(size=(32, 6, 4)).astype("float32")
    model(x, training=True)  # fits the ranges
    assert off(export, run, model, x, tmp_path / "model")[0] < 0.01


@both_formats
def test_an_activation_of_more_than_8_bits_is_refused_by_its_name(export, run, tmp_path):
    inputs = keras.Input((8,))
    x = klb.LearnedBitActivation(9, max_bits=16, name="fine")(inputs)
    model = klb.LearnedBitModel(inputs, klb.LearnedBitDense(4, bits=4)(x))
    model(np.random.default_rng(0).normal(size=(64, 8)), training=True)
    with pytest.raises(ValueError, match="at most 8 bits.* 'fine' with 9 bits"):
        export(model, tmp_path / "model", arithmetic="int8")
    assert not list(tmp_path.iterdir())
