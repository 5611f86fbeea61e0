"""`export_onnx`: a standard ONNX file with integer weights, for onnxruntime and other runtimes."""

import functools
import numbers

from keras_learnbits.arguments import choose
from keras_learnbits.export._activations import ConvertedActivations
from keras_learnbits.export._check import FLOAT_ARITHMETIC, INT8_ARITHMETIC, check_file
from keras_learnbits.export._extra import import_extra
from keras_learnbits.export._files import write_atomically
from keras_learnbits.export._filters import eight_bit_integers
from keras_learnbits.export._function import ModelFunction
from keras_learnbits.export._kernels import narrowest, shared
from keras_learnbits.export._onnx_graph import float_model, in_onnxruntime, replace_kernels
from keras_learnbits.export._onnx_integers import OnnxIntegers, zero_point_of
from keras_learnbits.export._report import ExportReport

# Bits of the unsigned integers that `Cast` takes, by the opset that brought them.
WIDTHS = {21: (4, 8, 16), 25: (2, 4, 8, 16)}


def export_onnx(model, path, *, arithmetic="float", input_signature=None, opset=25, check=True):
    """Writes a model as an ONNX file whose quantized kernels are integers.

    Each kernel is stored as its codes, in the narrowest type that holds them (2, 4, 8 or 16 bits
    wide), and decoded bit for bit to the quantized weights of the model, `step * (code + offset)`:
    by `Cast`, `Add` and `Mul`. onnxruntime computes these when it loads the file, since they have
    constants only, and then folds a batch normalization into the kernel; a prediction takes as
    long as with the float model. Biases, activations and arithmetic are float32.

    With `arithmetic="int8"` layers whose inputs are quantized (`LearnedBitActivation`,
    `to_learned_bits(..., activations=True)`) have int8 filters behind `DequantizeLinear`, with one
    scale per channel, and batch normalization folded, so that onnxruntime multiplies in integers:
    convolutions whose output is quantized, too, and all dense layers. Kernels of 8 bits, and of
    a `MinMaxQuantizer` of up to 8 bits, are then rounded to the nearest of 255 levels. Behind
    activations of 8 bits, those of 7 and 8 bits have 129 levels, with which no processor saturates.
    Activations have the learned ranges; those of fewer than 8 bits are clipped at their highest
    code. All other layers are computed in float32, and their kernels are stored in float32.

    For float arithmetic `DequantizeLinear` is not suitable: its zero point is an integer, whereas 0
    lies half-way between two levels of `LearnedScaleQuantizer`, and anywhere between two levels of
    `MinMaxQuantizer`. Moreover, onnxruntime decodes it again at each call.

    Inputs have the names of the model's `Input`s or dictionary keys, outputs those of the layers
    they come from or their keys, and open first dimensions are called `batch`. The metadata has the
    version of this library and the bits of each layer, as JSON under `"keras_learnbits"`.

    Args:
        model: A built Keras model with learned-bit layers and float32 kernels, which `to_keras`
            can convert. The file computes in float32, even if the model has a mixed precision.
        path: Path of the file.
        arithmetic: `"float"` or `"int8"`.
        input_signature: Structure of `tf.TensorSpec` that the model can be called with, e.g. with
            a fixed batch size. By default the one of its symbolic inputs, or float32 tensors
            of the shapes that a model with a custom `call` was built for.
        opset: Version of the ONNX operators, 21 or higher. Runtimes that do not have opset 25
            take 21, which has no 2-bit integers: kernels of 1 and 2 bits then take 4.
        check: Whether to run the file in onnxruntime with random inputs, and to refuse it if its
            predictions are not the model's.

    Returns:
        `ExportReport`: print it to see how each kernel is stored and used.

    Raises:
        ImportError: The packages of `pip install keras_learnbits[export]` are missing.
        ValueError: `opset` is not an integer from 21 to the newest that `onnx` knows, or
            `arithmetic` unknown; `"int8"` is given for a model without quantized activations, or
            with one of more than 8 bits; the model has no learned-bit layer, kernels that are not
            float32, weights that are not finite, inputs of unknown shape and no
            `input_signature`, or something that tf2onnx has no operator for, such as grouped
            convolutions; or the predictions of the file differ from the model's. Then no file is
            written, and an old one is unchanged.
        OSError: The file cannot be written. An old one is unchanged.

    Examples:
        >>> export_onnx(model, "model.onnx")  # doctest: +SKIP
        >>> session = onnxruntime.InferenceSession("model.onnx")  # doctest: +SKIP
    """
    onnx = import_extra("onnx")
    newest = onnx.defs.onnx_opset_version()
    if not (isinstance(opset, numbers.Integral) and min(WIDTHS) <= opset <= newest):
        raise ValueError(
            f"`opset` must be an integer from {min(WIDTHS)}, the first with 4-bit integers, to "
            f"{newest}, the newest of the installed `onnx`. Received: opset={opset!r}"
        )
    make_proto = choose(arithmetic, {"float": _in_float, "int8": _in_int8}, "arithmetic")
    function = ModelFunction(model, input_signature)
    proto, used = make_proto(function, opset)
    proto.ir_version = onnx.helper.find_min_ir_version_for(proto.opset_import)
    onnx.checker.check_model(proto, full_check=True)

    load = functools.partial(in_onnxruntime, inputs=function.inputs)
    rounding = INT8_ARITHMETIC if arithmetic == "int8" else FLOAT_ARITHMETIC
    checked = functools.partial(check_file, function=function, load=load, arithmetic=rounding)
    content = proto.SerializeToString()
    write_atomically(path, content, checked if check else None)
    rows = [
        (each.name, each.bits, *used.get(each.name, ("float32", "float32", "")))
        for each in function.kernels.values()
    ]
    return ExportReport(rows, len(content))


def _in_float(function, opset):
    """The ONNX model with codes that are decoded when it is loaded, and how each is stored."""
    widths = WIDTHS[max(version for version in WIDTHS if version <= opset)]
    version_converter = import_extra("onnx.version_converter")
    proto = version_converter.convert_version(float_model(function), opset)
    make = functools.partial(_decoded, widths=widths)
    replace_kernels(proto.graph, function.kernels, make)
    used = {
        each.name: (f"uint{narrowest(each.bits, widths)}", "float32", "")
        for each in function.kernels.values()
    }
    return proto, used


def _in_int8(function, opset):
    """The ONNX model with integer arithmetic, and how each kernel is stored."""
    activations = ConvertedActivations(function.model, zero_point_of, lowest=0)
    if not activations.grids:
        raise ValueError(
            "`arithmetic='int8'` needs quantized activations, as of "
            "`to_learned_bits(model, activations=True)`; without them onnxruntime computes in "
            f"float. Received: model={function.model.name!r} without a `LearnedBitActivation`"
        )
    version_converter = import_extra("onnx.version_converter")
    converted = float_model(function, function.frozen(activations.twin))
    proto = version_converter.convert_version(converted, opset)
    find = functools.partial(eight_bit_integers, list(function.kernels.values()))
    integers = OnnxIntegers(proto.graph, activations.grid, find)
    integers.rewrite()
    return proto, integers.used


def _decoded(kernel, output, widths):
    """Initializers and nodes that decode a kernel, for `replace_kernels`."""
    onnx = import_extra("onnx")
    width = narrowest(kernel.bits, widths)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(getattr(onnx.TensorProto, f"UINT{width}"))
    codes, offset, step, floats, shifted = (
        f"{kernel.name}/{part}" for part in ("codes", "offset", "step", "floats", "shifted")
    )
    constants = {
        codes: kernel.codes.astype(dtype),
        offset: shared(kernel.offset),
        step: shared(kernel.step),
    }
    nodes = [
        onnx.helper.make_node("Cast", [codes], [floats], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("Add", [floats, offset], [shifted]),
        onnx.helper.make_node("Mul", [shifted, step], [output]),
    ]
    return constants, nodes
