"""LiteRT's integer arithmetic: the integers of the file, and predictions in its runtime."""

import warnings

import keras
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from export_models import dense_model, image_model, with_random_weights
from thorough import thorough

import keras_learnbits as klb
from keras_learnbits.export import litert
from keras_learnbits.export._filters import exact_integers
from keras_learnbits.export._litert_graph import LiteRTGraph

L = keras.layers


def run(path, x):
    interpreter = Interpreter(str(path))
    predict = interpreter.get_signature_runner()
    (name,) = predict.get_input_details()
    (output,) = predict(**{name: x}).values()
    return output


def decoded(path, kernel):
    """The weights of a kernel as LiteRT's interpreter reads them: integers times their scales."""
    with warnings.catch_warnings(action="ignore"):  # the option is meant for debugging, as here
        interpreter = Interpreter(str(path), experimental_preserve_all_tensors=True)
    interpreter.allocate_tensors()
    (found,) = (e for e in interpreter.get_tensor_details() if e["name"] == f"{kernel}/codes")
    parameters = found["quantization_parameters"]
    assert not parameters["zero_points"].any()
    integers = interpreter.get_tensor(found["index"]).astype("float32")
    shape = [1] * integers.ndim
    shape[parameters["quantized_dimension"]] = -1
    return integers * parameters["scales"].reshape(shape), integers


def kinds(path):
    graph = LiteRTGraph(path.read_bytes())
    return [graph.kind_of(operator) for operator in graph.graph.operators]


def wide_model(bits, quantizer="learned_scale", activation_bits=None, signed=False, **dense):
    """An input that is quantized if activations are, and two dense layers of 2,048 weights."""
    inputs = keras.Input((32,), name="x")
    arguments = {"bits": bits, "max_bits": 16, "kernel_quantizer": quantizer}
    x = inputs
    if activation_bits:
        x = klb.LearnedBitActivation(bits=activation_bits, name="input_levels")(x)
    x = klb.LearnedBitDense(
        64, activation=None if signed else "relu", name="hidden", **arguments, **dense
    )(x)
    if activation_bits:
        x = klb.LearnedBitActivation(bits=activation_bits, name="levels")(x)
    outputs = klb.LearnedBitDense(32, name="head", **arguments)(x)
    model = with_random_weights(klb.LearnedBitModel(inputs, outputs))
    model(np.random.default_rng(1).normal(size=(64, 32)), training=True)  # fits the ranges
    return model


X = np.random.default_rng(2).normal(size=(200, 32)).astype("float32")


@pytest.mark.parametrize("arithmetic", ["float", "int8"])
@pytest.mark.parametrize("bits", [3, 7, *thorough(1, 2, 4, 5, 6)])
def test_the_weights_that_the_file_decodes_are_the_models_bit_for_bit(tmp_path, bits, arithmetic):
    model = wide_model(bits)
    klb.export_litert(model, tmp_path / "model.tflite", arithmetic=arithmetic)
    for layer in model.layers[1:]:
        kernel = layer.quantized_kernels["kernel"]
        if arithmetic == "int8" and bits <= 3:
            continue  # the interpreter shows 4-bit integers in their bytes
        weights, integers = decoded(tmp_path / "model.tflite", layer.name)
        np.testing.assert_array_equal(weights, kernel.quantized().numpy().T)
        assert (integers % 2 == 1).all()


def test_in_float_arithmetic_predictions_are_the_models_and_each_filter_is_decoded_once(tmp_path):
    model = image_model()
    report = klb.export_litert(model, tmp_path / "model.tflite")
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype("float32")
    expected = model.predict(x, verbose=0)
    np.testing.assert_allclose(run(tmp_path / "model.tflite", x), expected, rtol=0, atol=2e-5)
    assert kinds(tmp_path / "model.tflite").count("DEQUANTIZE") == len(report.rows) == 6
    assert {row[2:4] for row in report.rows} == {("int8", "float32")}
    assert not {"MUL", "SUB"} & {*kinds(tmp_path / "model.tflite")}  # the norm is folded


def test_a_batch_norm_with_negative_factors_is_folded_into_signs_and_scales(tmp_path):
    inputs = keras.Input((9, 9, 8), name="x")
    x = klb.LearnedBitConv2D(24, 3, bits=3, use_bias=False, name="conv")(inputs)
    norm = L.BatchNormalization()
    model = with_random_weights(klb.LearnedBitModel(inputs, L.Flatten()(norm(x))))
    norm.gamma.assign(np.linspace(-1, 1, 24))
    klb.export_litert(model, tmp_path / "model.tflite")
    _, integers = decoded(tmp_path / "model.tflite", "conv")
    codes = model.get_layer("conv").quantized_kernels["kernel"].stored().codes
    odd = (2 * codes - 7).transpose(3, 0, 1, 2) * np.sign(norm.gamma.numpy())[:, None, None, None]
    np.testing.assert_array_equal(integers, odd)
    x = np.random.default_rng(0).normal(size=(2, 9, 9, 8)).astype("float32")
    expected = model.predict(x, verbose=0)
    np.testing.assert_allclose(run(tmp_path / "model.tflite", x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("bits", "quantizer", "arithmetic", "stored", "note"),
    [
        (3, "learned_scale", "float", "int8", ""),
        (3, "learned_scale", "int8", "int4", ""),
        (7, "learned_scale", "int8", "int8", ""),
        (8, "learned_scale", "float", "float32", "no 8-bit integers"),
        (8, "learned_scale", "int8", "int8", "rounded to 255 levels"),
        (4, "min_max", "float", "float32", "no 8-bit integers"),
        (4, "min_max", "int8", "int8", "rounded to 255 levels"),
        (12, "learned_scale", "int8", "float32", "no 8-bit integers"),
    ],
)
def test_the_report_says_how_each_kernel_is_stored_and_why(
    tmp_path, bits, quantizer, arithmetic, stored, note
):
    model = wide_model(bits, quantizer)
    report = klb.export_litert(model, tmp_path / "model.tflite", arithmetic=arithmetic)
    computed = "int8" if arithmetic == "int8" and bits <= 8 else "float32"
    assert report.rows == [(name, bits, stored, computed, note) for name in ("hidden", "head")]
    assert report.size == (tmp_path / "model.tflite").stat().st_size
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "bits", "stored", "as", "arithmetic", "note"]


@pytest.mark.parametrize("bits", [3, *thorough(1, 5, 8)])
def test_in_integer_arithmetic_outputs_are_off_by_the_rounding_of_8_bit_inputs(tmp_path, bits):
    model = wide_model(bits)
    klb.export_litert(model, tmp_path / "model.tflite", arithmetic="int8")
    found, expected = run(tmp_path / "model.tflite", X), model.predict(X, verbose=0)
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert 1e-4 < error < 0.03  # the lower bound: it is not computed in float


@pytest.mark.parametrize("bits", [3, *thorough(2, 5, 7, 8)])
@pytest.mark.parametrize("signed", [False, True])
def test_between_quantized_activations_a_layer_computes_in_integers(tmp_path, bits, signed):
    model = wide_model(3, activation_bits=bits, signed=signed)
    klb.export_litert(model, tmp_path / "model.tflite", arithmetic="int8")
    graph = LiteRTGraph((tmp_path / "model.tflite").read_bytes())
    dense = graph.operators_of("FULLY_CONNECTED")[0]
    int8 = graph.schema.TensorType.INT8
    assert [graph.tensor(i).type for i in (dense.inputs[0], dense.inputs[1], dense.outputs[0])] == [
        int8
    ] * 3
    found, expected = run(tmp_path / "model.tflite", X), model.predict(X, verbose=0)
    # Values half-way between two levels may be rounded to either; a few differ, by one step.
    off = np.abs(found - expected).max(axis=1) / np.abs(expected).max()
    assert np.median(off) < 0.02
    assert off.max() < 0.2


@pytest.mark.parametrize("bits", [3, *thorough(2, 6, 8)])
@pytest.mark.parametrize("signed", [False, True])
def test_activations_are_cut_off_at_their_lowest_and_highest_level(tmp_path, bits, signed):
    """Oracle in NumPy: a layer whose outputs lie far beyond the range on both sides."""
    model = wide_model(3, activation_bits=bits, signed=signed)
    hidden = model.get_layer("hidden")
    hidden.bias.assign(np.tile([100.0, -100.0], 32))
    klb.export_litert(model, tmp_path / "model.tflite", arithmetic="int8")
    row = klb.bit_table(model).activations[1]
    low, high = row.bounds
    assert (low < 0) == signed
    levels = np.tile([high, low], 32).astype("float32")
    head = model.get_layer("head")
    expected = levels @ head.quantized_kernels["kernel"].quantized().numpy() + head.bias.numpy()
    found = run(tmp_path / "model.tflite", X)
    tolerance = 0.02 * np.abs(expected).max()
    np.testing.assert_allclose(found, np.tile(expected, (200, 1)), rtol=0, atol=tolerance)


def test_transposed_convolutions_stay_in_float_arithmetic(tmp_path):
    """With float inputs and integer weights LiteRT 2.3 takes ten times as long, and longer."""
    inputs = keras.Input((7, 7, 32), name="x")
    x = klb.LearnedBitConv2D(32, 3, bits=4, name="conv")(inputs)
    outputs = klb.LearnedBitConv2DTranspose(16, 3, strides=2, bits=4, name="transposed")(x)
    model = with_random_weights(klb.LearnedBitModel(inputs, outputs))
    report = klb.export_litert(model, tmp_path / "model.tflite", arithmetic="int8")
    assert report.rows == [
        ("conv", 4, "int8", "int8", ""),
        ("transposed", 4, "int8", "float32", "decoded when loaded"),
    ]
    graph = LiteRTGraph((tmp_path / "model.tflite").read_bytes())
    (transposed,) = graph.operators_of("TRANSPOSE_CONV")
    (decoding,) = graph.operators_of("DEQUANTIZE")
    assert transposed.inputs[1] == decoding.outputs[0]


def test_an_unknown_arithmetic_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`arithmetic` must be one of \['float', 'int8'\]"):
        klb.export_litert(dense_model(3), tmp_path / "model.tflite", arithmetic="int4")
    assert not list(tmp_path.iterdir())


def test_an_embedding_looks_up_integers_and_decodes_the_rows_that_it_finds(tmp_path):
    inputs = keras.Input((5,), dtype="int32", name="tokens")
    x = klb.LearnedBitEmbedding(50, 8, bits=4, name="embedding")(inputs)
    outputs = klb.LearnedBitDense(3, bits=3, name="head")(L.Flatten()(x))
    model = with_random_weights(klb.LearnedBitModel(inputs, outputs))
    report = klb.export_litert(model, tmp_path / "model.tflite")
    assert report.rows[0] == ("embedding", 4, "int8", "float32", "")
    tokens = np.random.default_rng(0).integers(0, 50, (20, 5)).astype("int32")
    expected = model.predict(tokens, verbose=0)
    np.testing.assert_allclose(run(tmp_path / "model.tflite", tokens), expected, atol=1e-5)


def test_a_table_that_is_looked_up_twice_is_stored_once(tmp_path):
    inputs = {name: keras.Input((1,), dtype="int32", name=name) for name in ("a", "b")}
    embedding = klb.LearnedBitEmbedding(3000, 8, bits=4, name="embedding")
    difference = L.Subtract()([embedding(each) for each in inputs.values()])
    model = with_random_weights(klb.LearnedBitModel(inputs, difference))
    report = klb.export_litert(model, tmp_path / "model.tflite")
    assert report.rows == [("embedding", 4, "int8", "float32", "")]
    assert report.size < 1.5 * 3000 * 8


def test_each_of_two_layers_with_equal_weights_is_reported_as_it_is_stored(tmp_path):
    inputs = keras.Input((32,), name="x")
    first = klb.LearnedBitDense(32, bits=3, name="first")
    second = klb.LearnedBitDense(32, bits=3, name="second")
    model = with_random_weights(klb.LearnedBitModel(inputs, second(L.ReLU()(first(inputs)))))
    second.set_weights(first.get_weights())
    report = klb.export_litert(model, tmp_path / "model.tflite")
    assert [row[2:] for row in report.rows] == [("int8", "float32", "")] * 2


def test_a_channel_that_integer_arithmetic_gets_wrong_is_refused(tmp_path, monkeypatch):
    def negated(*arguments):
        right = exact_integers(*arguments)
        integers = right.integers.copy()
        integers[0] *= -1
        return right._replace(integers=integers)

    monkeypatch.setattr(litert, "exact_integers", negated)
    with pytest.raises(ValueError, match="must predict what its model predicts"):
        klb.export_litert(wide_model(5), tmp_path / "model.tflite", arithmetic="int8")
    assert not list(tmp_path.iterdir())
