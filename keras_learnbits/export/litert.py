"""`export_litert`: a LiteRT (TensorFlow Lite) file with integer weights."""

import functools

import flatbuffers
import numpy as np
import tensorflow as tf

from keras_learnbits.export._check import check_file
from keras_learnbits.export._extra import import_extra
from keras_learnbits.export._files import write_atomically
from keras_learnbits.export._function import METADATA, ModelFunction
from keras_learnbits.export._kernels import narrowest, shared

# Bits of the signed integers that the DEQUANTIZE operator takes.
WIDTHS = (2, 4, 8, 16)
FILE_IDENTIFIER = b"TFL3"
# The first version of the operator that takes integers below 8 bits.
DEQUANTIZE_VERSION = 6
# The key that TensorFlow gives the signature of a model that has one.
SIGNATURE = "serving_default"


def export_litert(model, path, *, input_signature=None, check=True):
    """Writes a model as a LiteRT file whose quantized kernels are integers.

    Each kernel is stored as its codes, in the narrowest type that holds them (2, 4, 8 or 16 bits
    wide), and decoded to the quantized weights of the model, `step * (code + offset)`: by
    DEQUANTIZE with scale 1, an ADD and a MUL. That is exact bit for bit, except for the 16-bit
    codes of a `MinMaxQuantizer`, whose offset is rounded once more. Biases, activations and
    arithmetic are float32.

    The file has a signature, `"serving_default"`, with the names of the model's inputs (its
    `Input`s or dictionary keys) and outputs (their layers or keys). Its metadata have the version
    of this library and the bits of each layer, as JSON under `"keras_learnbits"`.

    The file uses LiteRT's own operators only. Recurrent layers need a fixed batch size, or
    `unroll=True`.

    Args:
        model: A built Keras model with learned-bit layers and float32 kernels, that `to_keras`
            converts. The file computes in float32, also where the model does in a mixed precision.
        path: Path of the file.
        input_signature: Structure of `tf.TensorSpec` that the model can be called with, e.g. with
            a fixed batch size. By default that of its symbolic inputs, or float32 tensors
            of the shapes that a model with a custom `call` was built for.
        check: Whether to run the file in LiteRT's interpreter with random inputs, and to refuse it
            if its predictions are not the model's.

    Raises:
        ImportError: The packages of `pip install keras_learnbits[export]` are missing.
        ValueError: The model has no learned-bit layer, kernels that are not float32, weights that
            are not finite, inputs of unknown shape and no `input_signature`, or something that
            LiteRT has no operator for; or the file does not predict what the model does. Then no
            file is written, and an old one stays.
        OSError: The file cannot be written. An old one stays.

    Examples:
        >>> export_litert(model, "model.tflite")  # doctest: +SKIP
        >>> interpreter = ai_edge_litert.interpreter.Interpreter("model.tflite")  # doctest: +SKIP
        >>> predict = interpreter.get_signature_runner()  # doctest: +SKIP
    """
    schema = import_extra("ai_edge_litert.schema_py_generated")
    function = ModelFunction(model, input_signature)
    converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [function.predict.get_concrete_function()]
    )
    # Batched products lose a ReLU that follows them (TensorFlow 2.21).
    converter.unfold_batchmatmul = True
    flat = schema.ModelT.InitFromPackedBuf(_converted(converter, function), 0)
    editor = _Editor(schema, flat)
    editor.replace_kernels(function.kernels)
    editor.add_signature(function)
    editor.add_metadata(METADATA, function.metadata())
    builder = flatbuffers.Builder()
    builder.Finish(flat.Pack(builder), FILE_IDENTIFIER)
    load = functools.partial(_in_litert, function=function)
    predicts_alike = functools.partial(check_file, function=function, load=load)
    write_atomically(path, bytes(builder.Output()), predicts_alike if check else None)


def _converted(converter, function):
    """The bytes of a LiteRT model whose kernels are inputs.

    Raises:
        ValueError: LiteRT has no operator for something in the model.
    """
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


class _Editor:
    """Edits the main graph of a LiteRT model.

    Attributes:
        schema: Module with the classes of the file format.
        model: `schema.ModelT`, changed in place.
        graph: `schema.SubGraphT`, the first of the model.
    """

    def __init__(self, schema, model):
        self.schema = schema
        self.model = model
        self.graph = model.subgraphs[0]

    def replace_kernels(self, kernels):
        """Replaces inputs by integers and the operators that decode them.

        Args:
            kernels: Dictionary of names of inputs to `StoredKernel`.
        """
        inputs = {self.graph.tensors[index].name.decode(): index for index in self.graph.inputs}
        moved = [self._carry_out_moves(inputs[name], kernel) for name, kernel in kernels.items()]
        operators = [each for index, kernel in moved for each in self._decoded(index, kernel)]
        self.graph.operators = operators + self.graph.operators
        self.graph.inputs = [index for name, index in inputs.items() if name not in kernels]

    def add_signature(self, function):
        """Gives inputs and outputs the names of the model.

        Args:
            function: `ModelFunction`.
        """
        inputs = {self.graph.tensors[index].name.decode(): index for index in self.graph.inputs}
        names = zip((spec.name for spec in function.specs), function.inputs, strict=True)
        given = {name: inputs[own] for own, name in names}
        for name, index in given.items():
            self.graph.tensors[index].name = name

        def named(indices):
            return [
                self.schema.TensorMapT(name=name, tensorIndex=index)
                for name, index in indices.items()
            ]

        results = dict(zip(function.outputs, self.graph.outputs, strict=True))
        self.model.signatureDefs = [
            self.schema.SignatureDefT(
                inputs=named(given), outputs=named(results), signatureKey=SIGNATURE
            )
        ]

    def add_metadata(self, name, text):
        """Adds an entry to the metadata of the file."""
        self.model.buffers.append(self.schema.BufferT(data=np.frombuffer(text.encode(), "uint8")))
        entry = self.schema.MetadataT(name=name, buffer=len(self.model.buffers) - 1)
        self.model.metadata = [*(self.model.metadata or []), entry]

    def _carry_out_moves(self, index, kernel):
        """Applies the moves after a kernel to it; returns the index of the last tensor, and it."""
        while True:
            users = [each for each in self.graph.operators if index in each.inputs]
            move = self._move(users[0]) if len(users) == 1 else None
            if move is None:
                return index, kernel
            self.graph.operators = [each for each in self.graph.operators if each is not users[0]]
            index, kernel = int(users[0].outputs[0]), kernel.moved(move)

    def _move(self, operator):
        """Function of arrays that an operator computes if it only moves elements, else None."""
        codes = self.schema.BuiltinOperator
        function = {codes.TRANSPOSE: np.transpose, codes.RESHAPE: np.reshape}.get(
            self.model.operatorCodes[operator.opcodeIndex].builtinCode
        )
        argument = None if function is None else self._constant(operator.inputs[1])
        return None if argument is None else lambda array: function(array, argument)

    def _constant(self, index):
        """The values of a constant int32 tensor; None for other tensors."""
        tensor = self.graph.tensors[index]
        data = self.model.buffers[tensor.buffer].data
        if data is None or tensor.type != self.schema.TensorType.INT32:
            return None
        return np.frombuffer(bytes(data), "<i4")

    def _decoded(self, index, kernel):
        """Adds the constants of a kernel; returns the operators that decode it into a tensor."""
        width = narrowest(kernel.bits, WIDTHS)
        # The zero point of 16-bit integers must be 0.
        lowest = 0 if 8 < kernel.bits < 16 else -(2 ** (width - 1))
        zero_point, shift = (lowest, 0) if width < 16 else (0, -lowest)
        offset, step = shared(kernel.offset) + np.float32(shift), shared(kernel.step)
        types, shape = self.schema.TensorType, kernel.codes.shape
        codes = self._tensor(
            f"{kernel.name}/codes",
            shape,
            getattr(types, f"INT{width}"),
            packed_integers(kernel.codes + lowest, width),
        )
        self.graph.tensors[codes].quantization = self.schema.QuantizationParametersT(
            scale=[1.0], zeroPoint=[zero_point]
        )
        integers, shifted = (
            self._tensor(f"{kernel.name}/{part}", shape) for part in ("integers", "shifted")
        )
        constants = (
            self._tensor(f"{kernel.name}/{part}", array.shape, data=array.view("uint8"))
            for part, array in (("offset", offset.ravel()), ("step", step))
        )
        return [
            self._operator("DEQUANTIZE", DEQUANTIZE_VERSION, [codes], integers),
            self._operator("ADD", 1, [integers, next(constants)], shifted),
            self._operator("MUL", 1, [shifted, next(constants)], index),
        ]

    def _tensor(self, name, shape, dtype=0, data=None):
        """Adds a tensor, which is constant if `data` (uint8) is given; returns its index."""
        buffer = 0  # the empty one
        if data is not None:
            buffer = len(self.model.buffers)
            self.model.buffers.append(self.schema.BufferT(data=data.ravel()))
        self.graph.tensors.append(
            self.schema.TensorT(shape=list(shape), type=dtype, buffer=buffer, name=name)
        )
        return len(self.graph.tensors) - 1

    def _operator(self, name, version, inputs, output):
        code = getattr(self.schema.BuiltinOperator, name)
        known = [each.builtinCode for each in self.model.operatorCodes]
        if code not in known:
            self.model.operatorCodes.append(
                self.schema.OperatorCodeT(
                    builtinCode=code, deprecatedBuiltinCode=code, version=version
                )
            )
            known.append(code)
        options = f"{name.capitalize()}Options"
        return self.schema.OperatorT(
            opcodeIndex=known.index(code),
            inputs=inputs,
            outputs=[output],
            builtinOptionsType=getattr(self.schema.BuiltinOptions, options),
            builtinOptions=getattr(self.schema, f"{options}T")(),
        )


def packed_integers(values, width):
    """Bytes of integers of `width` bits in two's complement, the first in the lowest bits.

    Examples:
        >>> packed_integers(np.array([1, -1, -8]), 4).tolist()
        [241, 8]
    """
    if width >= 8:
        return values.astype(f"<i{width // 8}").ravel().view("uint8")
    in_byte = 8 // width
    fields = np.pad(values.ravel() % 2**width, (0, -values.size % in_byte)).reshape(-1, in_byte)
    return (fields << (width * np.arange(in_byte))).sum(axis=1).astype("uint8")
