"""`export_qonnx`: a QONNX file with the bits of each layer, for hardware compilers."""

import functools

import numpy as np

from keras_learnbits.export._activations import activation_grids
from keras_learnbits.export._check import check_file
from keras_learnbits.export._extra import import_extra
from keras_learnbits.export._files import write_atomically
from keras_learnbits.export._function import ModelFunction
from keras_learnbits.export._kernels import shared
from keras_learnbits.export._onnx_graph import float_model, in_onnxruntime, replace_kernels
from keras_learnbits.export._qonnx_activations import DOMAIN, expand_quant_nodes, use_quant_nodes


def export_qonnx(model, path, *, input_signature=None, zero_point=True, check=True):
    """Writes a model as a QONNX file, in which nodes describe how kernels are quantized.

    Each kernel is followed by a `Quant` node with its bit-width, scale and zero point, or for the
    1-bit grid of `LearnedScaleQuantizer` by a `BipolarQuant` node. The kernel is stored with its
    quantized values, which the node does not change. Zero points are real numbers; with
    `LearnedScaleQuantizer` they are half-integers, because 0 lies between two levels.

    The `qonnx` package executes the file with the model's predictions, and its `inference_cost`
    reports the bits of `bit_table` for dense layers and convolutions. It supports no other layers,
    and executes recurrent ones only with `unroll=True`. It does not infer bits from a `Quant` node
    with a zero point, or from a `BipolarQuant` node with a scale. So these are followed by a
    `Dropout`, which does nothing at inference and has the annotation.

    Quantized activations are `Quant` nodes, too, of unsigned codes. They round halves up, which
    `Quant` does for numbers that are not negative; signed activations therefore have a zero point.

    Names and metadata are as in files of `export_onnx`.

    Some hardware compilers, such as FINN, need weights without a zero point. With
    `zero_point=False` codes are doubled to odd integers with one more bit at half the step, and
    there is no `Dropout`; 1-bit layers do not change. Signed activations are then written in
    standard operators.

    Args:
        model: A built Keras model with learned-bit layers and float32 kernels, which `to_keras`
            can convert. The file computes in float32, even if the model has a mixed precision.
        path: Path of the file.
        input_signature: Structure of `tf.TensorSpec` that the model can be called with, e.g. with
            a fixed batch size, which many compilers need. By default that of its symbolic inputs,
            or float32 tensors of the shapes that a model with a custom `call` was built for.
        zero_point: Whether `Quant` nodes may have a zero point other than 0.
        check: Whether to run the file with random inputs, `Quant` nodes in `qonnx` and the rest in
            onnxruntime, and to refuse it if its predictions differ from the model's.

    Raises:
        ImportError: The packages of `pip install keras_learnbits[export]` are missing.
        ValueError: The model has no learned-bit layer, kernels that are not float32, weights that
            are not finite, inputs of unknown shape and no `input_signature`, or something that
            ONNX has no operator for; `zero_point=False` and a kernel is on another grid than
            `LearnedScaleQuantizer`'s; or the predictions of the file differ from the model's. Then
            no file is written, and an old one is unchanged.
        OSError: The file cannot be written. An old one is unchanged.

    Examples:
        >>> export_qonnx(model, "model.onnx")  # doctest: +SKIP
        >>> qonnx.util.inference_cost.inference_cost("model.onnx")  # doctest: +SKIP
    """
    onnx = import_extra("onnx")
    function = ModelFunction(model, input_signature)
    proto = onnx.shape_inference.infer_shapes(float_model(function))
    shapes = {each.name: each for each in proto.graph.value_info}
    del proto.graph.value_info[:]  # those of tensors that are replaced, too
    make = functools.partial(_quantized, zero_point=zero_point)
    for tensor, kernel in replace_kernels(proto.graph, function.kernels, make).items():
        if zero_point:
            _annotate(proto.graph, tensor, f"SCALEDINT<{kernel.bits}>")
        proto.graph.value_info.extend(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, kernel.codes.shape)
            for name in (f"{kernel.name}/quantized", tensor)[not zero_point :]
        )
    grids = activation_grids(model)
    quantized = use_quant_nodes(proto.graph, grids, zero_point) if grids else []
    proto.graph.value_info.extend(shapes[name] for name in quantized if name in shapes)
    proto.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    onnx.checker.check_model(proto)
    content = onnx.shape_inference.infer_shapes(proto).SerializeToString()
    load = functools.partial(_in_qonnx, inputs=function.inputs)
    predicts_alike = functools.partial(check_file, function=function, load=load)
    write_atomically(path, content, predicts_alike if check else None)


def _in_qonnx(path, inputs):
    """The predictions of a file: `qonnx` computes its own nodes, onnxruntime all others.

    The executor of `qonnx` does this node by node, but supports neither open dimensions nor loops.
    Here the kernels are computed once, and the rest runs as one graph.

    Args:
        path: Path of the file.
        inputs: List of names of the inputs.

    Returns:
        Function of a list of input arrays to a list of output arrays.
    """
    onnx, registry = import_extra("onnx", "qonnx.custom_op.registry")
    proto = onnx.load(path)
    graph, to_array = proto.graph, onnx.numpy_helper.to_array
    values = {each.name: to_array(each) for each in graph.initializer}
    constant = [
        node
        for node in graph.node
        if node.domain == DOMAIN and all(name in values for name in node.input)
    ]
    for node in constant:
        registry.getCustomOp(node).execute_node(values, graph)
        graph.node.remove(node)
        (output,) = node.output
        values[output] = np.asarray(values[output], "float32")
        graph.initializer.append(onnx.numpy_helper.from_array(values[output], output))
    expand_quant_nodes(graph, values)
    return in_onnxruntime(proto.SerializeToString(), inputs)


def _quantized(kernel, output, zero_point):
    """Initializers and nodes that quantize a kernel, for `replace_kernels`."""
    if not zero_point and not kernel.is_mid_rise:
        raise ValueError(
            "`zero_point=False` needs kernels of `LearnedScaleQuantizer`, whose grids are "
            f"symmetric. Received: {kernel.name!r} with codes shifted by {kernel.offset.flat[0]}"
        )
    make_node = functools.partial(import_extra("onnx.helper").make_node, domain=DOMAIN)
    weights, scale, zero, bits, quantized = (
        f"{kernel.name}/{part}" for part in ("weights", "scale", "zero_point", "bits", "quantized")
    )
    last = quantized if zero_point else output
    step, offset = shared(kernel.step), shared(kernel.offset)
    if kernel.bits == 1 and kernel.is_mid_rise:
        constants = {weights: kernel.levels, scale: 0.5 * step}
        node = make_node("BipolarQuant", [weights, scale], [last])
    else:
        # Without a zero point, `step * (code + offset)` is `step / 2` times the odd integers
        # `2 * code + 2 * offset`: signed numbers of one more bit, of the narrow range.
        doubled = int(not zero_point)
        constants = {
            weights: kernel.levels,
            scale: 0.5 * step if doubled else step,
            zero: 0 * offset if doubled else -offset,
            bits: np.float32(kernel.bits + doubled),
        }
        inputs = [weights, scale, zero, bits]
        attributes = {"signed": doubled, "narrow": doubled, "rounding_mode": "ROUND"}
        node = make_node("Quant", inputs, [last], **attributes)
    annotated = make_node("Dropout", [quantized], [output], domain="")
    return constants, [node, annotated] if zero_point else [node]


def _annotate(graph, tensor, datatype):
    """Annotates a tensor with a `qonnx.core.datatype.DataType`."""
    annotation = graph.quantization_annotation.add(tensor_name=tensor)
    annotation.quant_parameter_tensor_names.add(key="finn_datatype", value=datatype)
