"""`export_litert`: a LiteRT (TensorFlow Lite) file with integer weights."""

import flatbuffers
import numpy as np
import tensorflow as tf

from keras_learnbits.export._extra import import_extra
from keras_learnbits.export._kernels import function_of_kernels, narrowest, shared
from keras_learnbits.export.packed.writer import write_atomically

# Bits of the signed integers that the DEQUANTIZE operator takes.
WIDTHS = (2, 4, 8, 16)
FILE_IDENTIFIER = b"TFL3"
# The first version of the operator that takes integers below 8 bits.
DEQUANTIZE_VERSION = 6


def export_litert(model, path, *, input_signature=None):
    """Writes a model as a LiteRT file whose quantized kernels are integers.

    Each kernel is stored as its codes, in the narrowest type that holds them (2, 4, 8 or 16 bits
    wide), and decoded to the quantized weights of the model, `step * (code + offset)`: by
    DEQUANTIZE with scale 1, an ADD and a MUL. That is exact bit for bit (but for the 16-bit codes
    of a `MinMaxQuantizer`, whose offset is rounded once more). All else is float32: biases,
    activations, arithmetic.

    The file uses LiteRT's own operators only; where there are none, its converter says so.
    Recurrent layers need a fixed batch size, or `unroll=True`.

    Args:
        model: A built Keras model with learned-bit layers and float32 kernels, that `to_keras`
            converts. The file computes in float32, also where the model does in a mixed precision.
        path: Where the file goes.
        input_signature: Structure of `tf.TensorSpec` that the model can be called with, e.g. with
            a fixed batch size; by default that of its symbolic inputs.

    Raises:
        ImportError: The packages of `pip install keras_learnbits[export]` are missing.
        ValueError: The model has no learned-bit layer, no symbolic inputs and no
            `input_signature`, or kernels that are not float32.

    Examples:
        >>> export_litert(model, "model.tflite")  # doctest: +SKIP
        >>> interpreter = ai_edge_litert.interpreter.Interpreter("model.tflite")  # doctest: +SKIP
    """
    schema = import_extra("ai_edge_litert.schema_py_generated")
    predict, _, kernels = function_of_kernels(model, input_signature)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([predict.get_concrete_function()])
    # Batched products lose a ReLU that follows them (TensorFlow 2.21).
    converter.unfold_batchmatmul = True
    flat = schema.ModelT.InitFromPackedBuf(converter.convert(), 0)
    _Editor(schema, flat).replace_kernels(kernels)
    builder = flatbuffers.Builder()
    builder.Finish(flat.Pack(builder), FILE_IDENTIFIER)
    write_atomically(path, bytes(builder.Output()))


class _Editor:
    """Edits the main graph of a LiteRT model.

    Attributes:
        schema: Module of the classes that the file format consists of.
        model: `schema.ModelT`, changed in place.
        graph: `schema.SubGraphT`, the first of the model.
    """

    def __init__(self, schema, model):
        self.schema = schema
        self.model = model
        self.graph = model.subgraphs[0]

    def replace_kernels(self, kernels):
        """Puts integers and operators that decode them in the place of inputs.

        Args:
            kernels: Dictionary of names of inputs to `KernelCodes`.
        """
        inputs = {self.graph.tensors[index].name.decode(): index for index in self.graph.inputs}
        moved = [self._carry_out_moves(inputs[name], kernel) for name, kernel in kernels.items()]
        operators = [each for index, kernel in moved for each in self._decoded(index, kernel)]
        self.graph.operators = operators + self.graph.operators
        self.graph.inputs = [index for name, index in inputs.items() if name not in kernels]

    def _carry_out_moves(self, index, kernel):
        """The tensor after the transpositions and reshapes that follow a kernel, and the kernel."""
        while True:
            users = [each for each in self.graph.operators if index in each.inputs]
            move = self._move(users[0]) if len(users) == 1 else None
            if move is None:
                return index, kernel
            self.graph.operators = [each for each in self.graph.operators if each is not users[0]]
            index, kernel = int(users[0].outputs[0]), kernel.moved(move)

    def _move(self, operator):
        """What an operator does to an array if it only moves elements, else None."""
        codes = self.schema.BuiltinOperator
        function = {codes.TRANSPOSE: np.transpose, codes.RESHAPE: np.reshape}.get(
            self.model.operatorCodes[operator.opcodeIndex].builtinCode
        )
        argument = None if function is None else self._constant(operator.inputs[1])
        return None if argument is None else lambda array: function(array, argument)

    def _constant(self, index):
        """The int32 values of a tensor, or None if it is none or computed."""
        tensor = self.graph.tensors[index]
        data = self.model.buffers[tensor.buffer].data
        if data is None or tensor.type != self.schema.TensorType.INT32:
            return None
        return np.frombuffer(bytes(data), "<i4")

    def _decoded(self, index, kernel):
        """Operators that decode a kernel into a tensor; adds its constants."""
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
        """Adds a tensor, a constant one if it has data (bytes, uint8); returns its index."""
        buffer = 0  # of no data
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
    """Two's complement integers of so many bits in bytes, the first in the lowest bits.

    Examples:
        >>> packed_integers(np.array([1, -1, -8]), 4).tolist()
        [241, 8]
    """
    if width >= 8:
        return values.astype(f"<i{width // 8}").ravel().view("uint8")
    in_byte = 8 // width
    fields = np.pad(values.ravel() % 2**width, (0, -values.size % in_byte)).reshape(-1, in_byte)
    return (fields << (width * np.arange(in_byte))).sum(axis=1).astype("uint8")
