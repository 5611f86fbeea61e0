import math

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
import tensorflow as tf
from export_models import (
    EVERY_WIDTH,
    branched_model,
    converted_model,
    dense_model,
    image_model,
    inputs_for,
    normalized_model,
    quantized,
    recurrent_model,
    text_model,
    with_random_weights,
)
from thorough import thorough

import keras_learnbits as klb
from keras_learnbits.export._function import ModelFunction
from keras_learnbits.export._kernels import narrowest, shared
from keras_learnbits.export.onnx import export_onnx
from keras_learnbits.layers.discovery import quantized_kernels

WIDTHS = (2, 4, 8, 16)


def run(path, x):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def arrays_of(path):
    """Initializers of a file: the elements' type and the array, by name."""
    initializers = onnx.load(path).graph.initializer
    return {
        each.name: (
            onnx.TensorProto.DataType.Name(each.data_type),
            onnx.numpy_helper.to_array(each),
        )
        for each in initializers
    }


def assert_predicts_alike(path, model):
    x = inputs_for(model)
    expected = model.predict(x, verbose=0)
    np.testing.assert_allclose(run(path, x), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize(
    "make",
    [
        converted_model,
        *thorough(image_model, text_model, recurrent_model, normalized_model),
    ],
)
def test_onnxruntime_predicts_what_the_model_predicts_for_all_kinds_of_layers(tmp_path, make):
    model = make()
    export_onnx(model, tmp_path / "model.onnx")
    assert_predicts_alike(tmp_path / "model.onnx", model)
    codes = [name for name in arrays_of(tmp_path / "model.onnx") if name.endswith("/codes")]
    assert sorted(codes) == sorted(f"{row.layer}/codes" for row in klb.bit_table(model).rows)


@pytest.mark.parametrize(("bits", "kernel_quantizer"), EVERY_WIDTH)
def test_at_every_width_the_file_predicts_alike_and_holds_the_codes_in_the_narrowest_type(
    tmp_path, bits, kernel_quantizer
):
    model = dense_model(bits, kernel_quantizer)
    export_onnx(model, tmp_path / "model.onnx")
    assert_predicts_alike(tmp_path / "model.onnx", model)
    arrays = arrays_of(tmp_path / "model.onnx")
    for kernel in quantized_kernels(model):
        name = kernel.layer.name
        stored_type, stored = arrays[f"{name}/codes"]
        codes, _ = kernel.encode()
        assert stored_type == f"UINT{min(width for width in WIDTHS if width >= bits)}"
        np.testing.assert_array_equal(stored.astype("int32"), codes)
        step, offset = arrays[f"{name}/step"][1], arrays[f"{name}/offset"][1]
        decoded = (stored.astype("float32") + offset) * step
        np.testing.assert_array_equal(decoded, kernel.quantized())


def test_kernels_decode_to_the_models_bit_for_bit_in_onnxruntime(tmp_path):
    model = image_model()
    export_onnx(model, tmp_path / "model.onnx")
    proto = onnx.load(tmp_path / "model.onnx")
    for name in ("conv", "depthwise", "dense"):
        (mul,) = [node for node in proto.graph.node if f"{name}/step" in node.input]
        proto.graph.output.append(onnx.helper.make_empty_tensor_value_info(mul.output[0]))
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    conv, depthwise, dense = session.run(None, {"image": inputs_for(model)})[1:]
    np.testing.assert_array_equal(conv, quantized(model.get_layer("conv")).transpose(3, 2, 0, 1))
    rows = quantized(model.get_layer("depthwise")).reshape(3, 3, 12)
    np.testing.assert_array_equal(depthwise, np.transpose(rows, (2, 0, 1))[:, None])
    np.testing.assert_array_equal(dense, quantized(model.get_layer("dense")))


def test_files_shrink_by_the_width_of_the_integers(tmp_path):
    sizes = {}
    for bits in (2, 4, 8, 16):
        export_onnx(dense_model(bits, units=4096), tmp_path / "model.onnx")
        sizes[bits] = (tmp_path / "model.onnx").stat().st_size
    weights = 12 * 4096 + 4096 * 3
    for narrow, wide in ((2, 4), (4, 8), (8, 16)):
        assert sizes[wide] - sizes[narrow] == pytest.approx(weights * narrow / 8, abs=100)


def test_branches_that_plain_keras_lists_in_another_order_keep_their_kernels(tmp_path):
    model = branched_model()
    export_onnx(model, tmp_path / "model.onnx")
    x = np.random.default_rng(1).normal(size=(2, 8, 4)).astype("float32")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {"a": x[0], "b": x[1]})
    np.testing.assert_allclose(found, model.predict(list(x), verbose=0), rtol=0, atol=1e-5)


def test_opset_21_has_no_2_bit_integers(tmp_path):
    model = dense_model(bits=2)
    export_onnx(model, tmp_path / "model.onnx", opset=21)
    assert onnx.load(tmp_path / "model.onnx").opset_import[0].version == 21
    assert arrays_of(tmp_path / "model.onnx")["hidden/codes"][0] == "UINT4"
    assert_predicts_alike(tmp_path / "model.onnx", model)
    for opset in (18, 99, 25.0, None):
        with pytest.raises(ValueError, match=f"integer from 21.* Received: opset={opset}"):
            export_onnx(model, tmp_path / "model.onnx", opset=opset)


def test_a_shared_kernel_is_stored_once(tmp_path):
    inputs = keras.Input((6, 6, 3))
    layer = klb.LearnedBitConv2D(3, 3, padding="same", bits=2, name="shared")
    model = with_random_weights(klb.LearnedBitModel(inputs, layer(layer(inputs))))
    export_onnx(model, tmp_path / "model.onnx")
    assert_predicts_alike(tmp_path / "model.onnx", model)
    assert sum(array.size == 81 for _, array in arrays_of(tmp_path / "model.onnx").values()) == 1


def test_several_inputs_and_outputs_keep_their_order_and_the_inputs_their_names(tmp_path):
    inputs = {"a": keras.Input((4,), name="a"), "b": keras.Input((4,), name="b")}
    x = klb.LearnedBitDense(5, bits=3, name="dense")(inputs["a"])
    y = klb.LearnedBitDense(6, bits=3, name="other")(inputs["b"])
    model = with_random_weights(klb.LearnedBitModel(inputs, [x, y]))
    export_onnx(model, tmp_path / "model.onnx")
    feed = {name: np.ones((2, 4), "float32") * len(name) for name in inputs}
    outputs = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, feed)
    for output, expected in zip(outputs, model.predict(feed, verbose=0), strict=True):
        np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_models_of_mixed_precision_are_exported_in_float32(tmp_path, policy):
    keras.config.set_dtype_policy(policy)
    export_onnx(dense_model(bits=2), tmp_path / "model.onnx")
    keras.config.set_dtype_policy("float32")
    assert_predicts_alike(tmp_path / "model.onnx", dense_model(bits=2))


def test_models_of_half_precision_and_plain_ones_are_refused(tmp_path):
    keras.config.set_dtype_policy("float16")
    with pytest.raises(ValueError, match="need float32 kernels.*Received: 'float16' in 'hidden'"):
        export_onnx(dense_model(bits=2), tmp_path / "model.onnx")
    keras.config.set_dtype_policy("float32")
    plain = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="at least one learned-bit layer"):
        export_onnx(plain, tmp_path / "model.onnx")


def test_codes_follow_the_moves_of_their_kernel():
    layer = klb.LearnedBitDepthwiseConv2D(3, depth_multiplier=2, bits=3)
    layer.build((None, 8, 8, 4))
    kernel = layer.quantized_kernels["kernel"].stored("d")
    np.testing.assert_array_equal(kernel.levels, quantized(layer))
    moved = kernel.moved(lambda array: array.reshape(3, 3, 8).transpose(2, 0, 1))
    np.testing.assert_array_equal(
        moved.levels, quantized(layer).reshape(3, 3, 8).transpose(2, 0, 1)
    )
    assert shared(kernel.step).shape == (1, 1, 4, 2)
    assert shared(moved.step).shape == (8, 1, 1)


def test_integers_take_the_narrowest_type_there_is():
    assert [narrowest(bits, WIDTHS) for bits in (1, 2, 3, 4, 5, 8, 9, 16)] == [
        2, 2, 4, 4, 8, 8, 16, 16
    ]  # fmt: skip
    assert narrowest(1, (4, 8, 16)) == 4


def test_what_onnx_has_no_operator_for_is_named_with_its_layer(tmp_path):
    layer = klb.LearnedBitConv2D(6, 3, groups=2, name="grouped")
    model = klb.LearnedBitSequential([keras.Input((8, 8, 4)), layer])
    with pytest.raises(ValueError, match=r"grouped convolutions.*PartitionedCall in 'grouped'$"):
        export_onnx(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_the_layer_that_is_named_is_the_innermost_of_those_with_such_a_scope():
    inner = keras.Sequential(
        [keras.Input((4,)), klb.LearnedBitDense(4, name="dense")], name="block"
    )
    second = klb.LearnedBitDense(4, name="dense_1")
    model = klb.LearnedBitSequential([keras.Input((4,)), inner, second])
    function = ModelFunction(model)
    nodes = function.predict.get_concrete_function().graph.get_operations()
    products = [node.name for node in nodes if node.type == "MatMul"]
    assert [function.layer_of(node) for node in products] == ["dense", "dense_1"]
    assert function.layer_of("elsewhere/MatMul") == "elsewhere/MatMul"


def tanh_gelu(x):
    return keras.activations.gelu(x, approximate=True)


@pytest.mark.parametrize("activation", [keras.activations.gelu, tanh_gelu])
def test_both_forms_of_gelu_are_exported(tmp_path, activation):
    inputs = keras.Input((12,), name="x")
    x = klb.LearnedBitDense(16, bits=3)(inputs)
    x = activation(x)
    model = with_random_weights(klb.LearnedBitModel(inputs, klb.LearnedBitDense(3, bits=3)(x)))
    export_onnx(model, tmp_path / "model.onnx")
    assert_predicts_alike(tmp_path / "model.onnx", model)


def test_erfc_is_exported_with_its_values_where_it_is_small_and_large(tmp_path):
    inputs = keras.Input((1,), name="x")
    layer = klb.LearnedBitDense(1, bits=1, use_bias=False)
    model = klb.LearnedBitModel(inputs, [keras.activations.gelu(inputs), layer(inputs)])
    export_onnx(model, tmp_path / "model.onnx")
    x = np.linspace(-8, 8, 161, dtype="float32")[:, None]
    # The definition: x times the probability that a standard normal value is below x.
    expected = [value * (1 + math.erf(value / math.sqrt(2))) / 2 for value in x[:, 0].tolist()]
    np.testing.assert_allclose(run(tmp_path / "model.onnx", x)[:, 0], expected, rtol=0, atol=1e-6)


def shapes_of(values):
    return {
        each.name: [axis.dim_param or axis.dim_value for axis in each.type.tensor_type.shape.dim]
        for each in values
    }


def test_inputs_and_outputs_have_the_models_names_and_a_batch(tmp_path):
    a, b = keras.Input((4,), name="first"), keras.Input((5,), name="second")
    total = klb.LearnedBitDense(3, name="total")(keras.layers.Concatenate()([a, b]))
    model = klb.LearnedBitModel([a, b], [total, keras.layers.ReLU(name="positive")(total)])
    export_onnx(model, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert shapes_of(graph.input) == {"first": ["batch", 4], "second": ["batch", 5]}
    assert shapes_of(graph.output) == {"total": ["batch", 3], "positive": ["batch", 3]}


def test_dictionary_keys_are_names_and_an_output_makes_way_for_an_input(tmp_path):
    given = {name: keras.Input((4,), name=name) for name in ("left", "the mask")}
    sums = klb.LearnedBitDense(4)(given["left"])
    model = klb.LearnedBitModel(given, {"left": sums + given["the mask"], "deep": [sums]})
    export_onnx(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert {each.name for each in session.get_inputs()} == {"left", "the mask"}
    names = [each.name for each in session.get_outputs()]
    assert names == ["deep/0", "left_output"]
    feed = {"left": np.ones((2, 4), "float32"), "the mask": np.full((2, 4), 3, "float32")}
    expected = model(feed)
    deep, whole = session.run(names, feed)
    np.testing.assert_allclose(deep, expected["deep"][0], rtol=1e-5)
    np.testing.assert_allclose(whole, expected["left"], rtol=1e-5)


def test_a_fixed_batch_and_open_axes_are_left_as_they_are(tmp_path):
    inputs = keras.Input((None, 4), name="sequence")
    model = klb.LearnedBitModel(inputs, klb.LearnedBitDense(3, name="head")(inputs))
    export_onnx(model, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert shapes_of(graph.input)["sequence"][0] == "batch"
    assert shapes_of(graph.input)["sequence"][1] not in ("batch", 0)
    signature = tf.TensorSpec((2, 7, 4), name="sequence")
    export_onnx(model, tmp_path / "model.onnx", input_signature=signature)
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert shapes_of(graph.input) == {"sequence": [2, 7, 4]}
    assert shapes_of(graph.output) == {"head": [2, 7, 3]}


def test_inputs_without_names_are_called_input(tmp_path):
    x, y = keras.Input((4,)), keras.Input((4,))
    model = klb.LearnedBitModel([x, y], klb.LearnedBitDense(3)(x + y))
    export_onnx(model, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert [each.name for each in graph.input] == ["input_0", "input_1"]
