"""`export_qonnx`: a QONNX file, whose nodes name each layer's bits; for hardware compilers."""

import functools

import numpy as np

from keras_learnbits.export._extra import import_extra
from keras_learnbits.export._kernels import shared
from keras_learnbits.export._onnx_graph import float_model, replace_kernels
from keras_learnbits.export.packed.writer import write_atomically

DOMAIN = "qonnx.custom_op.general"


def export_qonnx(model, path, *, input_signature=None, zero_point=True):
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

    Compilers to hardware want weights without a zero point, FINN for one. With
    `zero_point=False` they get doubled codes, odd integers of one bit more at half the step, and
    no `Dropout`; 1-bit layers stay as they are.

    Args:
        model: A built Keras model with learned-bit layers and float32 kernels, that `to_keras`
            converts. The file computes in float32, also where the model does in a mixed precision.
        path: Where the file goes.
        input_signature: Structure of `tf.TensorSpec` that the model can be called with, e.g. with
            a fixed batch size, which many compilers need; by default that of its symbolic inputs.
        zero_point: Whether `Quant` nodes may have a zero point other than 0.

    Raises:
        ImportError: The packages of `pip install keras_learnbits[export]` are missing.
        ValueError: The model has no learned-bit layer, no symbolic inputs and no
            `input_signature`, or kernels that are not float32; `zero_point=False` and a
            kernel is on another grid than `LearnedScaleQuantizer`'s.

    Examples:
        >>> export_qonnx(model, "model.onnx")  # doctest: +SKIP
        >>> qonnx.util.inference_cost.inference_cost("model.onnx")  # doctest: +SKIP
    """
    onnx = import_extra("onnx")
    proto, kernels = float_model(model, input_signature)
    make = functools.partial(_quantized, zero_point=zero_point)
    for tensor, kernel in replace_kernels(proto.graph, kernels, make).items():
        if zero_point:
            _annotate(proto.graph, tensor, f"SCALEDINT<{kernel.bits}>")
        proto.graph.value_info.extend(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, kernel.codes.shape)
            for name in (f"{kernel.name}/quantized", tensor)[not zero_point :]
        )
    proto.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    onnx.checker.check_model(proto)
    write_atomically(path, onnx.shape_inference.infer_shapes(proto).SerializeToString())


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
