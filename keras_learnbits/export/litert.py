"""`export_litert`: a LiteRT (TensorFlow Lite) file with integer weights."""

import functools

import tensorflow as tf

from keras_learnbits.arguments import choose
from keras_learnbits.export._activations import ConvertedActivations
from keras_learnbits.export._check import FLOAT_ARITHMETIC, INT8_ARITHMETIC, check_file
from keras_learnbits.export._extra import import_extra
from keras_learnbits.export._files import write_atomically
from keras_learnbits.export._filters import (
    ROUNDED_BITS,
    eight_bit_integers,
    exact_integers,
    find_kernel,
    nearest_integers,
)
from keras_learnbits.export._function import METADATA, ModelFunction
from keras_learnbits.export._litert_graph import FILTER_AXES, FILTER_INPUT, LiteRTGraph
from keras_learnbits.export._litert_integers import LOWEST, LiteRTIntegers, zero_point_of
from keras_learnbits.export._report import ExportReport

# The key that TensorFlow gives the signature of a model that has one.
SIGNATURE = "serving_default"
# For each arithmetic, the operators that multiply integer weights with float inputs, and the widths
# of weights that XNNPACK supports; 4-bit and 2-bit convolutions are slow or wrong in LiteRT 2.3.
# XNNPACK has no transposed convolution of float inputs and integer weights; the kernel that LiteRT
# 2.3 has takes at least ten times as long as XNNPACK's in float.
INTEGER_OPERATORS = {
    "float": {},
    "int8": {"CONV_2D": (8,), "FULLY_CONNECTED": (4, 8)},
}
# Filters with fewer elements stay in float arithmetic, as in LiteRT's own conversion, because
# rounding their inputs to 8 bits takes longer than it saves.
SMALLEST_INTEGER_FILTER = 1024


def export_litert(model, path, *, arithmetic="float", input_signature=None, check=True):
    """Writes a model as a LiteRT file whose quantized kernels are integers.

    Batch normalization is folded into the filter before it. Filters of kernels of up to 7 bits are
    int8 with one scale per output channel and zero point 0: a level of `LearnedScaleQuantizer` is
    half a step times an odd integer, `2 * code - (2**bits - 1)`, which is what the file stores. The
    weights are then the model's bit for bit (times the factor of a batch normalization). Kernels of
    8 bits and more, whose odd integers need 9 bits, and those of `MinMaxQuantizer`, whose zero
    point is not an integer, are stored as float32.

    With `arithmetic="float"` the integers are decoded when the file is loaded, and a prediction
    takes as long as with the float model. With `"int8"` convolutions and dense layers multiply in
    8 bits: LiteRT rounds their inputs to 8 bits at each call, with a range for each example. Dense
    layers of up to 3 bits are int4. Kernels of 8 bits, and of a `MinMaxQuantizer` of up to 8 bits,
    are then rounded to the nearest of 255 levels. A layer between two quantized activations
    (`LearnedBitActivation`) computes in integers only, with the learned ranges. Of the others,
    some are used in float arithmetic: depthwise convolutions, for which LiteRT has no such operator
    with float inputs, transposed convolutions, for which it has a slow one, filters of fewer than
    1,024 elements, and kernels of more than 8 bits.

    The file has a signature, `"serving_default"`, with the names of the model's inputs (its
    `Input`s or dictionary keys) and outputs (their layers or keys). Its metadata have the version
    of this library and the bits of each layer, as JSON under `"keras_learnbits"`. It uses LiteRT's
    own operators only. Recurrent layers need a fixed batch size, or `unroll=True`.

    Args:
        model: A built Keras model with learned-bit layers and float32 kernels, which `to_keras`
            can convert. The file computes in float32, even if the model has a mixed precision.
        path: Path of the file.
        arithmetic: `"float"` or `"int8"`.
        input_signature: Structure of `tf.TensorSpec` that the model can be called with, e.g. with
            a fixed batch size. By default the one of its symbolic inputs, or float32 tensors
            of the shapes that a model with a custom `call` was built for.
        check: Whether to run the file in LiteRT's interpreter with random inputs, and to refuse it
            if its predictions are not the model's, within the rounding of the arithmetic.

    Returns:
        `ExportReport`: print it to see how each kernel is stored and used.

    Raises:
        ImportError: The packages of `pip install keras_learnbits[export]` are missing.
        ValueError: `arithmetic` is unknown; `"int8"` is given for a model with a quantized
            activation of more than 8 bits; the model has no learned-bit layer, kernels that are
            not float32, weights that are not finite, inputs of unknown shape and no
            `input_signature`, or something that LiteRT has no operator for; or the predictions of
            the file differ from the model's. Then no file is written, and an old one is unchanged.
        OSError: The file cannot be written. An old one is unchanged.

    Examples:
        >>> print(export_litert(model, "model.tflite", arithmetic="int8"))  # doctest: +SKIP
        >>> interpreter = ai_edge_litert.interpreter.Interpreter("model.tflite")  # doctest: +SKIP
        >>> predict = interpreter.get_signature_runner()  # doctest: +SKIP
    """
    integer_operators = choose(arithmetic, INTEGER_OPERATORS, "arithmetic")
    function = ModelFunction(model, input_signature)
    kernels = list(function.kernels.values())
    used = {}
    if integer_operators:
        activations = ConvertedActivations(model, zero_point_of, LOWEST)
        graph = LiteRTGraph(_converted(function, function.frozen(activations.twin)))
        find = functools.partial(eight_bit_integers, kernels)
        integers = LiteRTIntegers(graph, activations.grid, find)
        integers.rewrite()
        used |= integers.used
    else:
        graph = LiteRTGraph(_converted(function, function.frozen()))
    used |= _use_integers(graph, kernels, integer_operators)
    names = (spec.name for spec in function.specs)
    graph.set_signature(SIGNATURE, dict(zip(names, function.inputs, strict=True)), function.outputs)
    graph.add_metadata(METADATA, function.metadata())
    content = graph.packed()
    load = functools.partial(_in_litert, function=function)
    tolerance = INT8_ARITHMETIC if integer_operators else FLOAT_ARITHMETIC
    checked = functools.partial(check_file, function=function, load=load, arithmetic=tolerance)
    write_atomically(path, content, checked if check else None)
    return ExportReport(_report_rows(kernels, used, arithmetic), len(content))


def _converted(function, frozen):
    """The bytes of the float model, as LiteRT's converter makes them.

    Args:
        function: `ModelFunction`, for errors.
        frozen: Concrete function without variables.

    Raises:
        ValueError: LiteRT has no operator for something in the model.
    """
    converter = tf.lite.TFLiteConverter.from_concrete_functions([frozen])
    try:
        return converter.convert()
    except Exception as error:  # the class of the converter's errors is not public
        missing = [
            f"{each.operator.name.removeprefix('tf.')} in {function.layer_of(call.name)!r}"
            for each in getattr(error, "errors", [])
            for call in each.location.call
            if call.name
        ]
        if not missing:
            raise
        raise ValueError(
            "LiteRT must have an operator for every operation of a model. Recurrent layers need "
            "`unroll=True`, or a fixed batch size in `input_signature`. "
            f"Received: model={function.model.name!r}, "
            f"with {', '.join(dict.fromkeys(missing))}"
        ) from error


def _use_integers(graph, kernels, integer_operators):
    """Replaces the filters of a graph by integers.

    Args:
        graph: `LiteRTGraph` with float filters, edited in place.
        kernels: List of `StoredKernel`.
        integer_operators: Dictionary of operators with integer arithmetic to the widths of
            integers that they take.

    Returns:
        Dictionary of the name of a kernel to its stored type, arithmetic, and a note.
    """
    used, decoded = {}, {}
    for operator in list(graph.graph.operators):
        kind = graph.kind_of(operator)
        if kind == "GATHER":
            used |= _gather_integers(graph, operator, kernels)
        if kind not in FILTER_AXES:
            continue
        axis, index = FILTER_AXES[kind], int(operator.inputs[FILTER_INPUT])
        # Converters store equal filters once; each use is assigned to a kernel not yet found.
        array, stored = decoded.get(index, (graph.constant(index), None))
        candidates = sorted(kernels, key=lambda each: each.name in used)
        kernel = None if array is None else find_kernel(array, axis, candidates)
        if kernel is None:
            continue
        if stored is not None:
            used.setdefault(kernel.name, stored)
            continue
        widths = integer_operators.get(kind, ())
        large = array.size >= SMALLEST_INTEGER_FILTER and len(graph.users(index)) == 1
        found = exact_integers(array, axis, kernel)
        if found is None and widths and large and kernel.bits <= ROUNDED_BITS:
            found = nearest_integers(array, axis, kernel)
        if found is None:
            used[kernel.name] = "float32", "float32", "no 8-bit integers"
            continue
        width = _narrowest_width(found.integers, widths if large else ())
        integers = graph.add_integers(
            f"{kernel.name}/codes", found.integers, width, found.scale, axis
        )
        if widths and large:
            graph.replace_input(operator, index, integers)
            used[kernel.name] = f"int{width}", "int8", found.note
        else:
            graph.decode_before_use(index, integers)
            used[kernel.name] = f"int{width}", "float32", found.note
            decoded[index] = array, used[kernel.name]
    return used


def _gather_integers(graph, operator, kernels):
    """Makes all lookups in a table read integers, and decodes only the rows that they find."""
    index = int(operator.inputs[0])
    array = graph.constant(index)
    if array is None or array.ndim != 2 or array.dtype != "float32":
        return {}
    # Converters store equal tables once.
    alike = [kernel for kernel in kernels if find_kernel(array, 1, [kernel]) is not None]
    if not alike:
        return {}
    found = exact_integers(array, 1, find_kernel(array, 1, alike))
    if found is None:
        return {kernel.name: ("float32", "float32", "no 8-bit integers") for kernel in alike}
    name = found.kernel.name
    integers = graph.add_integers(f"{name}/codes", found.integers, 8, [1.0])
    for lookup in graph.users(index):
        if graph.kind_of(lookup) == "GATHER":
            graph.replace_input(lookup, index, integers)
            graph.decode_result(lookup, found.scale, name)
    return {kernel.name: ("int8", "float32", "") for kernel in alike}


def _narrowest_width(integers, widths):
    """The narrowest of the widths that holds integers; 8 by default.

    XNNPACK takes 4-bit weights of an even number of inputs only.
    """
    fits = [8]
    if 4 in widths and abs(integers).max() < 8 and integers.shape[-1] % 2 == 0:
        fits.append(4)
    return min(fits)


def _report_rows(kernels, used, arithmetic):
    rows = []
    for kernel in kernels:
        stored, computed, note = used.get(
            kernel.name, ("float32", "float32", "no operator that takes integers")
        )
        if arithmetic == "int8" and computed == "float32" and stored != "float32":
            note = note or "decoded when loaded"
        rows.append((kernel.name, kernel.bits, stored, computed, note))
    return rows


def _in_litert(path, function):
    """Loads a file in LiteRT's interpreter, by its signature.

    Returns:
        Function of a list of arrays, the inputs, to a list of arrays, the outputs.
    """
    interpreter = import_extra("ai_edge_litert.interpreter").Interpreter(path)
    predict = interpreter.get_signature_runner(SIGNATURE)

    def run(inputs):
        outputs = predict(**dict(zip(function.inputs, inputs, strict=True)))
        return [outputs[name] for name in function.outputs]

    return run
