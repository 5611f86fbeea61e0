"""`export_onnx`: a standard ONNX file with integer weights, for onnxruntime and other runtimes."""

import functools

import numpy as np

from keras_learnbits.export._extra import import_extra
from keras_learnbits.export._kernels import narrowest, shared
from keras_learnbits.export._onnx_graph import float_model, replace_kernels
from keras_learnbits.export.packed.writer import write_atomically

# Bits of the unsigned integers that `DequantizeLinear` takes, by the opset that brought them.
WIDTHS = {21: (4, 8, 16), 25: (2, 4, 8, 16)}


def export_onnx(model, path, *, input_signature=None, opset=25):
    """Writes a model as an ONNX file whose quantized kernels are integers.

    Each kernel is stored as its codes, in the narrowest type that holds them (2, 4, 8 or 16 bits
    wide), and decoded bit for bit to the quantized weights of the model, `step * (code + offset)`:
    by `DequantizeLinear` with scale 1, an `Add` and a `Mul`. All else is float32: biases,
    activations, arithmetic.

    `DequantizeLinear` alone would not do: its zero point is an integer, and the grids of
    `LearnedScaleQuantizer` have their middle half-way between two levels, those of
    `MinMaxQuantizer` anywhere. Doubled codes need no zero point but one bit more, and onnxruntime
    replaces a `DequantizeLinear` in front of a `MatMul` by an operator that rounds activations
    to 8 bits.

    onnxruntime decodes the kernels anew for each batch; once for all, when it loads the file,
    with `SessionOptions.add_session_config_entry("session.disable_quant_qdq", "1")`.

    Args:
        model: A built Keras model with learned-bit layers and float32 kernels, that `to_keras`
            converts. The file computes in float32, also where the model does in a mixed precision.
        path: Where the file goes.
        input_signature: Structure of `tf.TensorSpec` that the model can be called with, e.g. with
            a fixed batch size; by default that of its symbolic inputs.
        opset: Version of the ONNX operators, 21 or higher. Runtimes that do not have opset 25
            take 21, which has no 2-bit integers: kernels of 1 and 2 bits then take 4.

    Raises:
        ImportError: The packages of `pip install keras_learnbits[export]` are missing.
        ValueError: `opset` is below 21; the model has no learned-bit layer, no symbolic inputs
            and no `input_signature`, kernels that are not float32, or something that ONNX has no
            operator for, as tf2onnx writes grouped convolutions.

    Examples:
        >>> export_onnx(model, "model.onnx")  # doctest: +SKIP
        >>> session = onnxruntime.InferenceSession("model.onnx")  # doctest: +SKIP
    """
    onnx, version_converter = import_extra("onnx", "onnx.version_converter")
    if opset < min(WIDTHS):
        raise ValueError(f"4-bit integers need `opset` 21 or higher. Received: opset={opset}")
    widths = WIDTHS[max(version for version in WIDTHS if version <= opset)]
    proto, kernels = float_model(model, input_signature)
    proto = version_converter.convert_version(proto, opset)
    replace_kernels(proto.graph, kernels, functools.partial(_decoded, widths=widths))
    proto.ir_version = onnx.helper.find_min_ir_version_for(proto.opset_import)
    onnx.checker.check_model(proto, full_check=True)
    write_atomically(path, proto.SerializeToString())


def _decoded(kernel, output, widths):
    """Initializers and nodes that decode a kernel, for `replace_kernels`."""
    onnx = import_extra("onnx")
    width = narrowest(kernel.bits, widths)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(getattr(onnx.TensorProto, f"UINT{width}"))
    codes, one, offset, step, integers, shifted = (
        f"{kernel.name}/{part}"
        for part in ("codes", "one", "offset", "step", "integers", "shifted")
    )
    constants = {
        codes: kernel.codes.astype(dtype),
        one: np.float32(1),
        offset: shared(kernel.offset),
        step: shared(kernel.step),
    }
    nodes = [
        onnx.helper.make_node("DequantizeLinear", [codes, one], [integers]),
        onnx.helper.make_node("Add", [integers, offset], [shifted]),
        onnx.helper.make_node("Mul", [shifted, step], [output]),
    ]
    return constants, nodes
