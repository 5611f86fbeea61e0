import keras
import numpy as np
import onnx
import pytest
import qonnx.core.onnx_exec
import tensorflow as tf
from export_models import (
    EVERY_WIDTH,
    dense_model,
    image_model,
    inputs_for,
    normalized_model,
    quantized,
)
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.core.onnx_exec import execute_onnx
from qonnx.util.cleanup import cleanup_model
from qonnx.util.inference_cost import inference_cost
from thorough import thorough

import keras_learnbits as klb
from keras_learnbits.export.qonnx import DOMAIN, export_qonnx

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:qonnx")
EXAMPLES = 4


def exported(model, tmp_path, **arguments):
    """The model that `qonnx` reads from an export with a batch of `EXAMPLES`."""
    shape = (EXAMPLES, *model.input.shape[1:])
    signature = tf.TensorSpec(shape, name="in")
    export_qonnx(model, tmp_path / "model.onnx", input_signature=signature, **arguments)
    return ModelWrapper(str(tmp_path / "model.onnx"))


def quant_nodes(graph):
    return [node for node in graph.node if node.domain == DOMAIN]


def assert_predicts_alike(wrapper, model):
    x = inputs_for(model, EXAMPLES)
    expected = model.predict(x, verbose=0)
    feed = {wrapper.graph.input[0].name: x}
    (output,) = qonnx.core.onnx_exec.execute_onnx(wrapper, feed).values()
    np.testing.assert_allclose(output, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def mean_weight_bits(wrapper):
    cost = inference_cost(wrapper)["total_cost"]
    return cost["total_mem_w_bits"] / cost["total_mem_w_elems"]


@pytest.mark.parametrize(("bits", "kernel_quantizer"), EVERY_WIDTH)
def test_qonnx_predicts_and_counts_bits_as_the_model_does_at_every_width(
    tmp_path, bits, kernel_quantizer
):
    model = dense_model(bits, kernel_quantizer)
    wrapper = exported(model, tmp_path)
    assert_predicts_alike(wrapper, model)
    assert mean_weight_bits(wrapper) == klb.bit_table(model).mean_bits == bits


@pytest.mark.parametrize("kernel_quantizer", ["learned_scale", *thorough("min_max")])
def test_convolutions_keep_their_bits_through_cleanup(tmp_path, kernel_quantizer):
    model = image_model(kernel_quantizer, transposed=False)
    wrapper = exported(model, tmp_path)
    assert_predicts_alike(wrapper, model)
    clean = cleanup_model(wrapper)
    assert len(quant_nodes(clean.graph)) == 5
    assert_predicts_alike(clean, model)
    np.testing.assert_allclose(mean_weight_bits(clean), klb.bit_table(model).mean_bits)


def test_constants_and_quantized_activations_predict_as_in_the_model(tmp_path):
    model = normalized_model()
    wrapper = exported(model, tmp_path)
    assert_predicts_alike(wrapper, model)
    assert mean_weight_bits(wrapper) == pytest.approx(klb.bit_table(model).mean_bits)


@pytest.mark.parametrize("zero_point", [True, *thorough(False)])
@pytest.mark.parametrize("bits", [2, *thorough(1, 4, 8)])
def test_each_node_returns_its_kernel_bit_for_bit(tmp_path, bits, zero_point):
    model = dense_model(bits)
    wrapper = exported(model, tmp_path, zero_point=zero_point)
    x = np.zeros((EXAMPLES, 12), "float32")
    context = qonnx.core.onnx_exec.execute_onnx(wrapper, {"in": x}, return_full_exec_context=True)
    for layer, node in zip(("hidden", "head"), quant_nodes(wrapper.graph), strict=True):
        levels = context[node.output[0]]
        np.testing.assert_array_equal(levels, quantized(model.get_layer(layer)))
        np.testing.assert_array_equal(levels, context[node.input[0]])


def test_nodes_say_how_wide_each_kernel_is(tmp_path):
    wrapper = exported(image_model(transposed=False), tmp_path)
    kinds = {node.input[0]: node.op_type for node in quant_nodes(wrapper.graph)}
    assert kinds.pop("dense/weights") == "BipolarQuant"
    assert set(kinds.values()) == {"Quant"}
    assert wrapper.get_initializer("conv/bits") == 2
    assert wrapper.get_initializer("separable/pointwise_kernel/bits") == 4
    assert (wrapper.get_initializer("conv/zero_point") == 1.5).all()
    assert wrapper.get_initializer("conv/scale").shape == (6, 1, 1, 1)


def test_without_zero_points_codes_are_doubled_and_take_one_bit_more(tmp_path):
    model = dense_model(bits=3)
    wrapper = exported(model, tmp_path, zero_point=False)
    assert_predicts_alike(wrapper, model)
    assert mean_weight_bits(wrapper) == 4
    assert "Dropout" not in [node.op_type for node in wrapper.graph.node]
    assert (wrapper.get_initializer("hidden/zero_point") == 0).all()
    integers = quantized(model.get_layer("hidden")) / wrapper.get_initializer("hidden/scale")
    np.testing.assert_allclose(integers % 2, 1, atol=1e-5)
    with pytest.raises(ValueError, match="needs kernels of `LearnedScaleQuantizer`.*'hidden'"):
        exported(dense_model(3, "min_max"), tmp_path, zero_point=False)


def test_the_file_passes_onnx_own_checks_with_a_batch_of_any_size(tmp_path):
    export_qonnx(image_model(transposed=False), tmp_path / "model.onnx")
    proto = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(proto)
    assert [each.name for each in proto.graph.input] == ["image"]
    assert {each.domain for each in proto.opset_import} >= {"", DOMAIN}


def activated(signed_hidden):
    """A quantized net with activations; its hidden ones are signed without a ReLU before them."""
    keras.utils.set_random_seed(0)
    hidden = keras.layers.Dense(6, activation=None if signed_hidden else "relu")
    model = keras.Sequential([keras.Input((5,)), hidden, keras.layers.Dense(3)])
    x = np.random.default_rng(0).normal(size=(64, 5)).astype("float32")
    settings = {"activations": {"bits": 4}, "power_of_two": True, "steps": 0, "verbose": 0}
    return klb.quantize(model, x, target_bits=3, **settings), x


@pytest.mark.parametrize("signed_hidden", [False, True])
@pytest.mark.parametrize("zero_point", [True, False])
def test_activations_are_quant_nodes_that_qonnx_executes(signed_hidden, zero_point, tmp_path):
    """The input is signed, so without a zero point it stays in standard operators."""
    model, x = activated(signed_hidden)
    path = tmp_path / "model.onnx"
    signature = tf.TensorSpec((1, 5), name="x")
    klb.export_qonnx(model, path, zero_point=zero_point, input_signature=signature)
    wrapper = ModelWrapper(str(path))
    kinds = [node.op_type for node in wrapper.graph.node]
    quantized = 2 if zero_point else 0 if signed_hidden else 1
    assert kinds.count("Quant") == 2 + quantized
    assert kinds.count("Floor") == 2 - quantized
    (name,) = (each.name for each in wrapper.graph.input)
    for row in x[:8]:
        (found,) = execute_onnx(wrapper, {name: row[None]}).values()
        np.testing.assert_array_equal(found, model(row[None]))


def test_halves_are_rounded_up_in_quant_nodes(tmp_path):
    """Inputs half-way between two levels, positive and negative."""
    model, _ = activated(signed_hidden=False)
    step = float(model.layers[1].grid().step)
    path = tmp_path / "model.onnx"
    klb.export_qonnx(model, path, input_signature=tf.TensorSpec((1, 5), name="x"))
    wrapper = ModelWrapper(str(path))
    (name,) = (each.name for each in wrapper.graph.input)
    row = np.float32([[-2.5, -1.5, -0.5, 0.5, 1.5]]) * np.float32(step)
    (found,) = execute_onnx(wrapper, {name: row}).values()
    np.testing.assert_array_equal(found, model(row))
