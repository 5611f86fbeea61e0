"""What the exporters to ONNX and QONNX share: a float graph, and its kernels replaced."""

import numpy as np
import tensorflow as tf

from keras_learnbits.export._extra import import_extra
from keras_learnbits.export._kernels import function_of_kernels

# The highest that tf2onnx writes.
CONVERTED_OPSET = 18


def float_model(model, input_signature=None):
    """An ONNX model of opset 18 whose quantized kernels are inputs.

    Args:
        model: A built Keras model with learned-bit layers.
        input_signature: As in `function_of_kernels`.

    Returns:
        `onnx.ModelProto`, and a dictionary of the names of its inputs to `KernelCodes`.

    Raises:
        ValueError: Something in the model has no operator in ONNX.
    """
    tf2onnx, onnx = import_extra("tf2onnx", "onnx")
    predict, specs, kernels = function_of_kernels(model, input_signature)
    proto, _ = tf2onnx.convert.from_function(predict, specs, opset=CONVERTED_OPSET)
    unknown = {
        node.op_type
        for node in all_nodes(proto.graph)
        if not onnx.defs.has(node.op_type, node.domain)
    }
    if unknown:
        raise ValueError(
            "tf2onnx must find an ONNX operator for all that a model does; it finds none for "
            f"grouped convolutions, for one. Received: model={model.name!r} with {sorted(unknown)}"
        )
    _make_initializers(proto.graph, _captured(predict.get_concrete_function()))
    return proto, kernels


def _captured(function):
    """Constants of a model that are no variables, e.g. of `Normalization`: names and arrays."""
    captured = function.captured_inputs
    inner = function.inputs[len(function.inputs) - len(captured) :]
    pairs = zip(inner, captured, strict=True)
    return {own.name: outer.numpy() for own, outer in pairs if outer.dtype != tf.resource}


def _make_initializers(graph, arrays):
    """Turns inputs, as which tf2onnx takes such constants, into initializers."""
    taken = {each.name for each in graph.input} & arrays.keys()
    _assign(graph.input, [each for each in graph.input if each.name not in taken])
    graph.initializer.extend(_tensor(name, arrays[name]) for name in sorted(taken))


def replace_kernels(graph, kernels, make):
    """Puts nodes in the place of the inputs that hold kernels.

    Transpositions and reshapes of a kernel are carried out, so that they need no nodes.

    Args:
        graph: `onnx.GraphProto`, changed in place.
        kernels: Dictionary of names of inputs to `KernelCodes`.
        make: Function of a `KernelCodes`, and of the name of the tensor with its levels, to a
            dictionary of names to arrays, which become initializers, and a list of nodes.

    Returns:
        Dictionary of the names of the tensors with levels to `KernelCodes`, moved.
    """
    moved = dict(_carry_out_moves(graph, name, kernel) for name, kernel in kernels.items())
    nodes, arrays = [], {}
    for name, kernel in moved.items():
        kernel_arrays, kernel_nodes = make(kernel, name)
        arrays |= kernel_arrays
        nodes += kernel_nodes
    inputs = [each for each in graph.input if each.name not in kernels]
    _assign(graph.input, inputs)
    _assign(graph.node, [*nodes, *graph.node])
    used = {name for node in all_nodes(graph) for name in node.input}
    kept = [each for each in graph.initializer if each.name in used]
    _assign(graph.initializer, kept + [_tensor(name, array) for name, array in arrays.items()])
    return moved


def all_nodes(graph):
    """The nodes of a graph, and those of the graphs in their attributes."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from all_nodes(attribute.g)


def _carry_out_moves(graph, name, kernel):
    """The tensor after the transpositions and reshapes that follow a kernel, and the kernel."""
    constants = {each.name: each for each in graph.initializer}
    while True:
        users = [node for node in all_nodes(graph) if name in node.input]
        move = _move(users[0], constants) if len(users) == 1 else None
        if move is None or users[0] not in graph.node:
            return name, kernel
        graph.node.remove(users[0])
        kernel, name = kernel.moved(move), users[0].output[0]


def _move(node, constants):
    """What a node does to an array if it only moves elements, else None."""
    numpy_helper = import_extra("onnx.numpy_helper")
    if node.op_type == "Transpose":
        permutation = node.attribute[0].ints
        return lambda array: np.transpose(array, permutation)
    if node.op_type in ("Reshape", "Squeeze", "Unsqueeze") and node.input[1] in constants:
        argument = tuple(numpy_helper.to_array(constants[node.input[1]]).tolist())
        function = {"Reshape": np.reshape, "Squeeze": np.squeeze, "Unsqueeze": np.expand_dims}
        if node.op_type != "Reshape" or 0 not in argument:
            return lambda array: function[node.op_type](array, argument)
    return None


def _tensor(name, array):
    return import_extra("onnx.numpy_helper").from_array(np.asarray(array, order="C"), name)


def _assign(repeated, values):
    """Assigns a list to a repeated field of a protocol buffer."""
    del repeated[:]
    repeated.extend(values)
