"""`export_qonnx`: a QONNX file, whose nodes name each layer's bits; for hardware compilers."""

import functools

import numpy as np

from keras_learnbits.export._check import check_file
from keras_learnbits.export._extra import import_extra
from keras_learnbits.export._files import write_atomically
from keras_learnbits.export._function import ModelFunction
from keras_learnbits.export._kernels import shared
from keras_learnbits.export._onnx_graph import float_model, in_onnxruntime, replace_kernels

DOMAIN = "qonnx.custom_op.general"


def export_qonnx(model, path, *, input_signature=None, zero_point=True, check=True):
    """Writes a model as a QONNX file: float kernels, each with a node that says what it is.

    Behind each kernel stands a `Quant` node with its bit-width, scale and zero point, which
    rounds the kernel to what it already is, bit for bit, or, for the 1-bit grid of
    `LearnedScaleQuantizer`, a `BipolarQuant` node. Zero points are real numbers, half-integers
    with `LearnedScaleQuantizer`, whose middle lies between two levels.

    The `qonnx` package executes the file with the model's predictions, and its `inference_cost`
    reports the bits of `bit_table` for dense layers and convolutions (it knows no other layers;
    nor does it execute recurrent ones but with `unroll=True`).
    Since it infers no bits from a `Quant` node with a zero point, nor from a `BipolarQuant` node
    with a scale, a `Dropout` follows, which does nothing at inference but carries the annotation.

    Names and metadata are as `export_onnx` has them.

    Compilers to hardware want weights without a zero point, FINN for one. With
    `zero_point=False` they get doubled codes, odd integers of one bit more at half the step, and
    no `Dropout`; 1-bit layers stay as they are.

    Args:
        model: A built Keras model with learned-bit layers and float32 kernels, that `to_keras`
            converts. The file computes in float32, also where the model does in a mixed precision.
        path: Path of the file.
        input_signature: Structure of `tf.TensorSpec` that the model can be called with, e.g. with
            a fixed batch size, which many compilers need. By default that of its symbolic inputs,
            or float32 tensors of the shapes that a model with a custom `call` was built for.
        zero_point: Whether `Quant` nodes may have a zero point other than 0.
        check: Whether to run the file with random inputs, its `Quant` nodes in `qonnx` and the rest
            in onnxruntime, and to refuse it if its predictions are not the model's.

    Raises:
        ImportError: The packages of `pip install keras_learnbits[export]` are missing.
        ValueError: The model has no learned-bit layer, kernels that are not float32, weights that
            are not finite, inputs of unknown shape and no `input_signature`, or something that
            ONNX has no operator for; `zero_point=False` and a kernel is on another grid than
            `LearnedScaleQuantizer`'s; or the file does not predict what the model does. Then no
            file is written, and an old one stays.
        OSError: The file cannot be written. An old one stays.

    Examples:
        >>> export_qonnx(model, "model.onnx")  # doctest: +SKIP
        >>> qonnx.util.inference_cost.inference_cost("model.onnx")  # doctest: +SKIP
    """
    onnx = import_extra("onnx")
    function = ModelFunction(model, input_signature)
    proto = float_model(function)
    make = functools.partial(_quantized, zero_point=zero_point)
    for tensor, kernel in replace_kernels(proto.graph, function.kernels, make).items():
        if zero_point:
            _annotate(proto.graph, tensor, f"SCALEDINT<{kernel.bits}>")
        proto.graph.value_info.extend(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, kernel.codes.shape)
            for name in (f"{kernel.name}/quantized", tensor)[not zero_point :]
        )
    proto.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    onnx.checker.check_model(proto)
    content = onnx.shape_inference.infer_shapes(proto).SerializeToString()
    load = functools.partial(_in_qonnx, inputs=function.inputs)
    predicts_alike = functools.partial(check_file, function=function, load=load)
    write_atomically(path, content, predicts_alike if check else None)


def _in_qonnx(path, inputs):
    """What a file predicts: nodes of QONNX as `qonnx` computes them, all others in onnxruntime.

    That is what the executor of `qonnx` does, too, node by node; but it takes no graph with an open
    dimension and no loops. Here kernels are computed once, and the rest runs as one graph.

    Args:
        path: Path of the file.
        inputs: Names of the inputs.

    Returns:
        Function of a list of arrays, the inputs, to a list of arrays, the outputs.
    """
    onnx, registry = import_extra("onnx", "qonnx.custom_op.registry")
    proto = onnx.load(path)
    graph, to_array = proto.graph, onnx.numpy_helper.to_array
    values = {each.name: to_array(each) for each in graph.initializer}
    for node in [node for node in graph.node if node.domain == DOMAIN]:
        registry.getCustomOp(node).execute_node(values, graph)
        graph.node.remove(node)
        (output,) = node.output
        values[output] = np.asarray(values[output], "float32")
        graph.initializer.append(onnx.numpy_helper.from_array(values[output], output))
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
    """Says of which `qonnx.core.datatype.DataType` a tensor is."""
    annotation = graph.quantization_annotation.add(tensor_name=tensor)
    annotation.quant_parameter_tensor_names.add(key="finn_datatype", value=datatype)
