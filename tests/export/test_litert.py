import keras
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from export_models import (
    EVERY_WIDTH,
    converted_model,
    dense_model,
    image_model,
    inputs_for,
    normalized_model,
    recurrent_model,
    text_model,
    volume_model,
    with_random_weights,
)
from thorough import thorough

import keras_learnbits as klb
from keras_learnbits.export._litert_graph import packed_integers
from keras_learnbits.export.litert import export_litert


def run(path, x):
    interpreter = Interpreter(str(path))
    (given,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.resize_tensor_input(given["index"], x.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(given["index"], x)
    interpreter.invoke()
    return interpreter.get_tensor(result["index"])


def assert_predicts_alike(path, model, examples=4):
    x = inputs_for(model, examples)
    expected = model.predict(x, verbose=0)
    np.testing.assert_allclose(run(path, x), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def tensors_of(path):
    """Tensors of a file and their bytes, by name."""
    flat = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    return {
        each.name.decode(): (each, flat.buffers[each.buffer].data)
        for each in flat.subgraphs[0].tensors
    }


def unpacked(data, width):
    """Two's complement integers of so many bits, bit by bit; the oracle of the packing."""
    bits = np.unpackbits(np.asarray(data, "uint8"), bitorder="little").reshape(-1, width)
    unsigned = (bits.astype("int64") << np.arange(width)).sum(axis=1)
    return unsigned - (bits[:, -1].astype("int64") << width)


@pytest.mark.parametrize(
    "make",
    [
        converted_model,
        *thorough(image_model, volume_model, text_model, normalized_model),
    ],
)
def test_litert_predicts_what_the_model_predicts_for_all_kinds_of_layers(tmp_path, make):
    model = make()
    report = export_litert(model, tmp_path / "model.tflite")
    assert_predicts_alike(tmp_path / "model.tflite", model)
    assert [row[0] for row in report.rows] == [row.layer for row in klb.bit_table(model).rows]
    codes = [name for name in tensors_of(tmp_path / "model.tflite") if name.endswith("/codes")]
    integers = [name for name, _, stored, *_ in report.rows if stored != "float32"]
    assert sorted(codes) == sorted(f"{name}/codes" for name in integers)


def test_recurrent_layers_need_a_fixed_batch_size(tmp_path):
    model = recurrent_model()
    signature = tf.TensorSpec((1, 7, 5), name="sequence")
    export_litert(model, tmp_path / "model.tflite", input_signature=signature)
    assert_predicts_alike(tmp_path / "model.tflite", model, examples=1)


@pytest.mark.parametrize(("bits", "kernel_quantizer"), EVERY_WIDTH)
def test_at_every_width_the_file_predicts_what_the_model_predicts(tmp_path, bits, kernel_quantizer):
    model = dense_model(bits, kernel_quantizer)
    export_litert(model, tmp_path / "model.tflite")
    assert_predicts_alike(tmp_path / "model.tflite", model)


def test_kernels_are_the_only_inputs_that_go(tmp_path):
    inputs = {"a": keras.Input((4,), name="a"), "b": keras.Input((4,), name="b")}
    x = klb.LearnedBitDense(5, bits=3, name="dense")(inputs["a"])
    y = klb.LearnedBitDense(6, bits=3, name="other")(inputs["b"])
    model = with_random_weights(klb.LearnedBitModel(inputs, [x, y]))
    export_litert(model, tmp_path / "model.tflite")
    interpreter = Interpreter(str(tmp_path / "model.tflite"))
    interpreter.allocate_tensors()
    assert [each["name"] for each in interpreter.get_input_details()] == ["a", "b"]
    feed = {name: np.full((1, 4), len(name) + 1, "float32") for name in inputs}
    for each in interpreter.get_input_details():
        interpreter.set_tensor(each["index"], feed[each["name"]])
    interpreter.invoke()
    outputs = [interpreter.get_tensor(e["index"]) for e in interpreter.get_output_details()]
    for output, expected in zip(outputs, model.predict(feed, verbose=0), strict=True):
        np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)


def test_files_shrink_by_the_width_of_the_integers(tmp_path):
    weights, sizes = 12 * 4096 + 4096 * 3, {}
    for bits, arithmetic in ((8, "float"), (7, "float"), (7, "int8"), (3, "int8")):
        model = dense_model(bits, units=4096)
        report = export_litert(model, tmp_path / "model.tflite", arithmetic=arithmetic)
        sizes[bits, arithmetic] = report.size
    scales = (4 + 8) * (4096 + 3)  # LiteRT wants a zero point of 8 bytes for each scale
    saved = sizes[8, "float"] - sizes[7, "float"]
    assert saved == pytest.approx(3 * weights - scales, rel=0.02)
    assert sizes[7, "int8"] == pytest.approx(sizes[7, "float"], rel=0.02)
    assert sizes[7, "int8"] - sizes[3, "int8"] == pytest.approx(weights / 2, rel=0.02)


@pytest.mark.parametrize("width", [2, 4, 8, 16])
def test_packed_integers_are_read_back_bit_by_bit(width):
    values = np.arange(-(2 ** (width - 1)), 2 ** (width - 1))
    np.testing.assert_array_equal(unpacked(packed_integers(values, width), width), values)
    odd = packed_integers(values[:3], width)
    assert odd.dtype == np.uint8
    assert len(odd) == -(-3 * width // 8)


@pytest.mark.parametrize("shape", [(12,), (5, 12)])
def test_a_relu_behind_a_dense_layer_without_bias_stays(tmp_path, shape):
    model = klb.LearnedBitSequential(
        [
            keras.Input(shape, name="x"),
            klb.LearnedBitDense(8, bits=3, use_bias=False, activation="relu"),
            klb.LearnedBitDense(8, bits=3),
            keras.layers.ReLU(max_value=6),
        ]
    )
    export_litert(with_random_weights(model), tmp_path / "model.tflite")
    assert_predicts_alike(tmp_path / "model.tflite", model)


def signature_of(path):
    (signature,) = Interpreter(str(path)).get_signature_list().items()
    return signature


def test_the_signature_has_the_models_names_whatever_the_order(tmp_path):
    given = {name: keras.Input((4,), name=name) for name in ("second", "first input")}
    sums = klb.LearnedBitDense(3, bits=3)(given["second"])
    model = klb.LearnedBitModel(given, {"total": sums, "parts": [sums + 1, given["first input"]]})
    export_litert(with_random_weights(model), tmp_path / "model.tflite")
    key, names = signature_of(tmp_path / "model.tflite")
    assert key == "serving_default"
    assert set(names["inputs"]) == {"first input", "second"}
    assert set(names["outputs"]) == {"parts/0", "parts/1", "total"}
    feed = {name: np.full((2, 4), len(name), "float32") for name in given}
    interpreter = Interpreter(str(tmp_path / "model.tflite"))
    found = interpreter.get_signature_runner()(**feed)
    expected = model.predict(feed, verbose=0)
    np.testing.assert_allclose(found["total"], expected["total"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["parts/0"], expected["parts"][0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found["parts/1"], feed["first input"])


def test_outputs_are_named_after_their_layers_and_inputs_may_be_unused(tmp_path):
    a, b = keras.Input((4,), name="used"), keras.Input((4,), name="unused")
    total = klb.LearnedBitDense(3, name="total")(a)
    model = klb.LearnedBitModel([a, b], [total, keras.layers.ReLU(name="positive")(total)])
    export_litert(model, tmp_path / "model.tflite")
    _, names = signature_of(tmp_path / "model.tflite")
    assert names == {"inputs": ["unused", "used"], "outputs": ["positive", "total"]}


def test_what_litert_has_no_operator_for_is_named_with_its_layer(tmp_path):
    with pytest.raises(ValueError, match=r"unroll=True.*TensorListReserve in 'lstm'"):
        export_litert(recurrent_model(), tmp_path / "model.tflite")
    assert not list(tmp_path.iterdir())
