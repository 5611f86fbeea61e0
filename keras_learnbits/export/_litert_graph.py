"""`LiteRTGraph`: edits the main graph of a LiteRT file."""

import flatbuffers
import numpy as np

from keras_learnbits.export._extra import import_extra

FILE_IDENTIFIER = b"TFL3"
# Numbers of operators are also stored in an older field of 8 bits, up to this number:
# https://github.com/tensorflow/tensorflow/blob/master/tensorflow/compiler/mlir/lite/schema/schema.fbs
LARGEST_OLD_CODE = 127
# Versions of the added operators that support one scale per channel.
VERSIONS = {"DEQUANTIZE": 5, "MUL": 1, "QUANTIZE": 2}
# Operators with a filter, their second input: the axis of its output channels.
FILTER_INPUT = 1
FILTER_AXES = {"CONV_2D": 0, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 0, "TRANSPOSE_CONV": 0}


class LiteRTGraph:
    """The main graph of a LiteRT file, to be edited in place.

    Args:
        content: Bytes of the file.

    Attributes:
        schema: Module with the classes of the file format.
        model: `schema.ModelT`.
        graph: `schema.SubGraphT`, the first of the model.
    """

    def __init__(self, content):
        self.schema = import_extra("ai_edge_litert.schema_py_generated")
        self.model = self.schema.ModelT.InitFromPackedBuf(content, 0)
        self.graph = self.model.subgraphs[0]
        codes = vars(self.schema.BuiltinOperator)
        self._names = {number: name for name, number in codes.items() if isinstance(number, int)}

    def packed(self):
        """The bytes of the edited file, without the constants that nothing reads any more."""
        read = {int(i) for each in self.graph.operators for i in each.inputs}
        read |= {int(i) for i in [*self.graph.inputs, *self.graph.outputs]}
        used = {entry.buffer for entry in self.model.metadata or []}
        for graph in self.model.subgraphs:
            used |= {
                tensor.buffer
                for index, tensor in enumerate(graph.tensors)
                if graph is not self.graph or index in read
            }
        for index, buffer in enumerate(self.model.buffers):
            if index not in used:
                buffer.data = None
        builder = flatbuffers.Builder()
        builder.Finish(self.model.Pack(builder), FILE_IDENTIFIER)
        return bytes(builder.Output())

    def kind_of(self, operator):
        """Name of an operator, e.g. `"CONV_2D"`."""
        return self._names[self.model.operatorCodes[operator.opcodeIndex].builtinCode]

    def constant(self, index):
        """The float32 array of a tensor; None if it has another type or is computed."""
        tensor = self.graph.tensors[index]
        data = self.model.buffers[tensor.buffer].data
        if data is None or tensor.type != self.schema.TensorType.FLOAT32:
            return None
        return np.frombuffer(bytes(data), "<f4").reshape(tensor.shape)

    def tensor(self, index):
        """The `schema.TensorT` of an index."""
        return self.graph.tensors[int(index)]

    def operators_of(self, kind):
        """List of the operators of a kind."""
        return [each for each in self.graph.operators if self.kind_of(each) == kind]

    def users(self, index):
        """The operators that read a tensor."""
        return [each for each in self.graph.operators if index in each.inputs]

    def is_read_once(self, index):
        """Whether one operator reads a tensor, and the graph does not return it."""
        return len(self.users(index)) == 1 and index not in self.graph.outputs

    def add_integers(self, name, integers, width, scale, axis=0):
        """Adds a constant tensor of integers.

        Args:
            name: Name of the tensor.
            integers: Array of integers.
            width: Bits of their type: 2, 4 or 8.
            scale: List of float32 scales: one, or one for each index of `axis`.
            axis: Axis of the scales.

        Returns:
            Index of the tensor.
        """
        index = self.add_tensor(
            name, integers.shape, f"INT{width}", packed_integers(integers, width)
        )
        self._quantize(index, scale, axis)
        return index

    def add_floats(self, name, array):
        """Adds a constant tensor of a float32 array; returns its index."""
        return self.add_tensor(name, array.shape, "FLOAT32", array.ravel().view("uint8"))

    def add_result(self, name, like, kind="FLOAT32"):
        """Adds a tensor that is computed, of the shape of another one; returns its index.

        Args:
            name: Name of the tensor.
            like: Index of the other tensor.
            kind: Name of its type. Integers have scale 1.
        """
        other = self.graph.tensors[like]
        index = self.add_tensor(name, other.shape, kind)
        self.graph.tensors[index].shapeSignature = other.shapeSignature
        if kind != "FLOAT32":
            self._quantize(index, [1.0], 0)
        return index

    def add_tensor(self, name, shape, kind, data=None):
        """Adds a tensor, a constant one if it has data (bytes, uint8); returns its index."""
        buffer = 0  # the empty one
        if data is not None:
            buffer = len(self.model.buffers)
            self.model.buffers.append(self.schema.BufferT(data=data))
        kind = getattr(self.schema.TensorType, kind)
        self.graph.tensors.append(
            self.schema.TensorT(shape=list(map(int, shape)), type=kind, buffer=buffer, name=name)
        )
        return len(self.graph.tensors) - 1

    def add_bias(self, name, integers, scale):
        """Adds a constant int32 tensor with one scale for each element; returns its index."""
        index = self.add_tensor(name, integers.shape, "INT32", integers.view("uint8"))
        self._quantize(index, scale, 0)
        return index

    def set_quantized(self, index, scale, zero_point):
        """Makes a computed tensor one of int8 integers with a scale and a zero point."""
        self.tensor(index).type = self.schema.TensorType.INT8
        self._quantize(index, [scale], 0, zero_point)

    def fuse_relu(self, operator):
        """Fuses a ReLU into an operator that has no fused function."""
        functions = self.schema.ActivationFunctionType
        if operator.builtinOptions.fusedActivationFunction == functions.NONE:
            operator.builtinOptions.fusedActivationFunction = functions.RELU

    def insert_after(self, operator, new):
        """Adds an operator right after another one."""
        self.graph.operators.insert(self._position(operator) + 1, new)

    def move_before(self, operator, other):
        """Moves an operator right before another one."""
        self.remove(operator)
        self.graph.operators.insert(self._position(other), operator)

    def remove(self, operator):
        """Removes an operator."""
        del self.graph.operators[self._position(operator)]

    def _position(self, operator):
        return next(i for i, each in enumerate(self.graph.operators) if each is operator)

    def _quantize(self, index, scale, axis, zero_point=0):
        self.tensor(index).quantization = self.schema.QuantizationParametersT(
            scale=np.asarray(scale, "float32"),
            zeroPoint=np.full(len(scale), zero_point, "int64"),
            quantizedDimension=axis,
        )

    def operator(self, name, inputs, output):
        """A new operator, which is not yet part of the graph."""
        options = f"{name.capitalize()}Options"
        return self.schema.OperatorT(
            opcodeIndex=self._code(name),
            inputs=inputs,
            outputs=[output],
            builtinOptionsType=getattr(self.schema.BuiltinOptions, options),
            builtinOptions=getattr(self.schema, f"{options}T")(),
        )

    def _code(self, name):
        """Index of an operator's code in at least the version of `VERSIONS`; adds it."""
        number = getattr(self.schema.BuiltinOperator, name)
        codes = self.model.operatorCodes
        for index, code in enumerate(codes):
            if code.builtinCode == number:
                code.version = max(code.version, VERSIONS[name])
                return index
        codes.append(
            self.schema.OperatorCodeT(
                builtinCode=number,
                deprecatedBuiltinCode=min(number, LARGEST_OLD_CODE),
                version=VERSIONS[name],
            )
        )
        return len(codes) - 1

    def decode_before_use(self, index, integers):
        """Computes a tensor from an integer tensor, before all other operators.

        Args:
            index: Index of the float32 tensor, until now a constant.
            integers: Index of the integer tensor.
        """
        self.graph.tensors[index].buffer = 0
        self.graph.operators.insert(0, self.operator("DEQUANTIZE", [integers], index))

    def replace_input(self, operator, old, new):
        """Makes an operator read another tensor."""
        operator.inputs = [new if index == old else int(index) for index in operator.inputs]

    def decode_result(self, operator, scale, name):
        """Multiplies the result of an operator, which is now of integers, by scales.

        Args:
            operator: Operator of one output.
            scale: Float32 array that broadcasts against the output.
            name: Prefix of the names of new tensors.
        """
        (output,) = map(int, operator.outputs)
        integers = self.add_result(f"{name}/gathered", output, "INT8")
        floats = self.add_result(f"{name}/floats", output)
        operator.outputs = [integers]
        after = self._position(operator) + 1
        self.graph.operators[after:after] = [
            self.operator("DEQUANTIZE", [integers], floats),
            self.operator("MUL", [floats, self.add_floats(f"{name}/scale", scale)], output),
        ]

    def set_signature(self, key, inputs, outputs):
        """Names inputs and outputs.

        Args:
            key: Name of the signature.
            inputs: Dictionary of the name of an input's tensor to its new name.
            outputs: List of names of the outputs.
        """
        indices = {self.graph.tensors[index].name.decode(): index for index in self.graph.inputs}
        given = {new: indices[old] for old, new in inputs.items()}
        for name, index in given.items():
            self.graph.tensors[index].name = name
        results = dict(zip(outputs, self.graph.outputs, strict=True))

        def named(pairs):
            return [self.schema.TensorMapT(name=n, tensorIndex=i) for n, i in pairs.items()]

        self.model.signatureDefs = [
            self.schema.SignatureDefT(inputs=named(given), outputs=named(results), signatureKey=key)
        ]

    def add_metadata(self, name, text):
        """Adds an entry to the metadata of the file."""
        self.model.buffers.append(self.schema.BufferT(data=np.frombuffer(text.encode(), "uint8")))
        entry = self.schema.MetadataT(name=name, buffer=len(self.model.buffers) - 1)
        self.model.metadata = [*(self.model.metadata or []), entry]


def packed_integers(values, width):
    """Two's complement integers of `width` bits in bytes, the first in the lowest bits.

    Examples:
        >>> packed_integers(np.array([1, -1, -8]), 4).tolist()
        [241, 8]
    """
    if width >= 8:
        return values.astype(f"<i{width // 8}").ravel().view("uint8")
    in_byte = 8 // width
    fields = np.pad(values.ravel() % 2**width, (0, -values.size % in_byte)).reshape(-1, in_byte)
    return (fields << (width * np.arange(in_byte))).sum(axis=1).astype("uint8")
