"""onnxruntime's integer arithmetic, in its optimized graph."""

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
from export_models import dense_model, with_random_weights
from thorough import thorough

import keras_learnbits as klb

L = keras.layers


def optimized_kinds(path, tmp_path):
    """Kinds of the nodes that onnxruntime runs for a file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


def run(path, x):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return session.run(None, {given.name: x})[0]


def image_net(activation_bits, activation="relu"):
    """Convolutions with a norm behind the pooling, a depthwise one, and a dense layer."""
    inputs = keras.Input((16, 16, 3), name="image")
    x = L.Conv2D(16, 3, padding="same", use_bias=False, name="first")(inputs)
    x = L.Activation("relu")(L.BatchNormalization(name="norm")(L.MaxPooling2D()(x)))
    x = L.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
    x = L.Activation(activation)(L.BatchNormalization()(x))
    x = L.Conv2D(16, 1, name="second")(x)
    x = L.Dense(20, activation="relu", name="dense")(L.Flatten()(x))
    net = keras.Model(inputs, L.Dense(5, name="head")(x))
    model = klb.to_learned_bits(net, bits=4, activations={"bits": activation_bits})
    model = with_random_weights(model)
    # Only positive factors commute with the pooling before them.
    model.get_layer("norm").gamma.assign(np.linspace(0.5, 1.5, 16))
    model(np.random.default_rng(1).normal(size=(64, 16, 16, 3)), training=True)  # fits the ranges
    return model


X = np.random.default_rng(2).normal(size=(40, 16, 16, 3)).astype("float32")


@pytest.mark.parametrize(
    ("bits", "activation"), [(8, "relu6"), *thorough((8, "relu"), (4, "relu"))]
)
def test_onnxruntime_fuses_convolutions_and_products_to_integer_operators(
    bits, activation, tmp_path
):
    model = image_net(bits, activation)
    report = klb.export_onnx(model, tmp_path / "model.onnx", arithmetic="int8")
    assert {row[0]: row[2:4] for row in report.rows} == dict.fromkeys(
        ("first", "depthwise", "second", "dense", "head"), ("int8", "int8")
    )
    kinds = optimized_kinds(tmp_path / "model.onnx", tmp_path)
    assert kinds.count("QLinearConv") == 3
    assert not {"Conv", "MatMul", "BatchNormalization", "Mul"} & {*kinds}
    found, expected = run(tmp_path / "model.onnx", X), model.predict(X, verbose=0)
    off = np.abs(found - expected).max(axis=1) / np.abs(expected).max()
    assert np.median(off) < {8: 0.005, 4: 0.1}[bits]


@pytest.mark.parametrize(
    ("kernel_bits", "activation_bits", "note"),
    [
        (7, 8, "rounded to 129 levels"),
        *thorough((2, 8, ""), (6, 8, ""), (8, 8, "rounded to 129 levels")),
        *thorough((7, 7, ""), (8, 7, "rounded to 255 levels"), (8, 4, "rounded to 255 levels")),
    ],
)
def test_no_sum_of_two_products_saturates_in_16_bits(kernel_bits, activation_bits, note, tmp_path):
    """x86 processors without VNNI would compute other predictions."""
    net = keras.Sequential([keras.Input((64,)), L.Dense(32, activation="relu"), L.Dense(5)])
    activations = {"bits": activation_bits}
    model = klb.to_learned_bits(net, bits=kernel_bits, activations=activations)
    model = with_random_weights(model)
    x = np.random.default_rng(1).uniform(0, 4, (100, 64)).astype("float32")
    model(x, training=True)  # fits the ranges
    report = klb.export_onnx(model, tmp_path / "model.onnx", arithmetic="int8")
    assert {row[2:] for row in report.rows} == {("int8", "int8", note)}
    arrays = map(onnx.numpy_helper.to_array, onnx.load(tmp_path / "model.onnx").graph.initializer)
    weights = [array for array in arrays if array.dtype == np.int8 and array.ndim == 2]
    assert len(weights) == 2
    for array in weights:
        highest, magnitude = 2**activation_bits - 1, np.abs(array.astype(int)).max()
        assert magnitude >= 32
        assert 2 * highest * magnitude < 2**15
    found, expected = run(tmp_path / "model.onnx", x), model.predict(x, verbose=0)
    worst = np.abs(found - expected).max() / np.abs(expected).max()
    assert worst < (0.03 if activation_bits > 4 else 0.2)


@pytest.mark.parametrize("bits", [3, *thorough(2, 5, 7, 8)])
@pytest.mark.parametrize("signed", [False, True])
def test_the_codes_of_few_bits_are_clipped_exactly(tmp_path, bits, signed):
    """Oracle in NumPy: a layer whose outputs lie far beyond the range on both sides."""
    inputs = keras.Input((32,), name="x")
    x = klb.LearnedBitActivation(bits=8, name="input_levels")(inputs)
    x = klb.LearnedBitDense(64, activation=None if signed else "relu", bits=3, name="hidden")(x)
    x = klb.LearnedBitActivation(bits=bits, name="levels")(x)
    outputs = klb.LearnedBitDense(8, bits=3, name="head")(x)
    model = with_random_weights(klb.LearnedBitModel(inputs, outputs))
    model(np.random.default_rng(1).normal(size=(64, 32)), training=True)
    model.get_layer("hidden").bias.assign(np.tile([100.0, -100.0], 32))
    klb.export_onnx(model, tmp_path / "model.onnx", arithmetic="int8")
    low, high = klb.bit_table(model).activations[1].bounds
    head = model.get_layer("head")
    levels = np.tile([high, low], 32).astype("float32")
    expected = levels @ head.quantized_kernels["kernel"].quantized().numpy() + head.bias.numpy()
    x = np.random.default_rng(2).normal(size=(5, 32)).astype("float32")
    found = run(tmp_path / "model.onnx", x)
    np.testing.assert_allclose(found, np.tile(expected, (5, 1)), rtol=0, atol=1e-4 * abs(high))


def test_zeros_before_a_strided_convolution_are_padded_in_integers(tmp_path):
    inputs = keras.Input((16, 16, 3), name="image")
    x = L.Conv2D(8, 3, activation="relu", name="first")(inputs)
    x = L.ZeroPadding2D(((0, 1), (2, 1)))(x)
    x = L.DepthwiseConv2D(3, strides=2, activation="relu", name="strided")(x)
    x = L.GlobalMaxPooling2D()(L.Conv2D(8, 1, activation="relu", name="last")(x))
    model = klb.to_learned_bits(
        keras.Model(inputs, L.Dense(5, name="head")(x)), bits=4, activations=True
    )
    model = with_random_weights(model)
    model(X, training=True)  # fits the ranges
    report = klb.export_onnx(model, tmp_path / "model.onnx", arithmetic="int8")
    assert {row[2:4] for row in report.rows} == {("int8", "int8")}
    kinds = optimized_kinds(tmp_path / "model.onnx", tmp_path)
    assert kinds.count("QLinearConv") == 3
    assert "Pad" not in kinds
    found, expected = run(tmp_path / "model.onnx", X), model.predict(X, verbose=0)
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


def test_in_float_arithmetic_onnxruntime_decodes_kernels_once(tmp_path):
    report = klb.export_onnx(dense_model(3), tmp_path / "model.onnx")
    assert [row[2:4] for row in report.rows] == [("uint4", "float32")] * 2
    kinds = optimized_kinds(tmp_path / "model.onnx", tmp_path)
    assert not {"Cast", "Mul", "DequantizeLinear"} & {*kinds}


def test_integer_arithmetic_without_quantized_activations_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"needs quantized activations.*activations=True"):
        klb.export_onnx(dense_model(3), tmp_path / "model.onnx", arithmetic="int8")
    with pytest.raises(ValueError, match=r"`arithmetic` must be one of \['float', 'int8'\]"):
        klb.export_onnx(dense_model(3), tmp_path / "model.onnx", arithmetic="int4")
    assert not list(tmp_path.iterdir())
