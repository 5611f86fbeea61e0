"""Float ONNX graphs, and the replacement of their kernels; for ONNX and QONNX."""

import numpy as np
import tensorflow as tf

from keras_learnbits.export._extra import import_extra
from keras_learnbits.export._function import METADATA
from keras_learnbits.layers.discovery import free_name

# The highest opset that tf2onnx writes.
CONVERTED_OPSET = 18


def float_model(function, frozen=None):
    """An ONNX model of opset 18 whose quantized kernels are inputs, or constants.

    Args:
        function: `ModelFunction`.
        frozen: Concrete function of the inputs alone, with kernels as constants, or None.

    Returns:
        `onnx.ModelProto`. Its inputs and outputs have the names that the function gives them.

    Raises:
        ValueError: Something in the model has no operator in ONNX.
    """
    tf2onnx, onnx = import_extra("tf2onnx", "onnx")
    predict = function.predict
    if frozen is not None:
        predict = tf.function(
            lambda *inputs: frozen(*inputs), input_signature=function.specs, autograph=False
        )
    concrete = predict.get_concrete_function()
    proto, _ = tf2onnx.convert.from_function(
        predict,
        concrete.structured_input_signature[0],
        opset=CONVERTED_OPSET,
        custom_op_handlers={"Erfc": (_convert_erfc, [])},
    )
    unknown = [
        node for node in all_nodes(proto.graph) if not onnx.defs.has(node.op_type, node.domain)
    ]
    if unknown:
        missing = [f"{node.op_type} in {function.layer_of(node.name)!r}" for node in unknown]
        raise ValueError(
            "tf2onnx must find an ONNX operator for every operation of a model; it has none for "
            "grouped convolutions, for example. Avoid the operation, or export to LiteRT. "
            f"Received: model={function.model.name!r}, with {', '.join(dict.fromkeys(missing))}"
        )
    _make_initializers(proto.graph, _captured(concrete))
    _name_inputs_and_outputs(proto.graph, function)
    onnx.helper.set_model_props(proto, {METADATA: function.metadata()})
    return proto


def in_onnxruntime(model, inputs):
    """Loads an ONNX model in onnxruntime.

    Args:
        model: Path of a file, or its bytes.
        inputs: Names of the inputs.

    Returns:
        Function of a list of arrays, the inputs, to a list of arrays, the outputs.
    """
    onnxruntime = import_extra("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only, because predictions are compared anyway
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda arrays: session.run(None, dict(zip(inputs, arrays, strict=True)))


def _convert_erfc(graph, node, name, arguments):
    """Writes `Erfc` as `1 - Erf`.

    Keras's exact GELU uses `Erfc`, which ONNX does not have, and tf2onnx 1.17 converts `Erf` only.
    This is one of its `custom_op_handlers`: https://github.com/onnx/tensorflow-onnx
    """
    one = graph.make_const(f"{name}/one", np.ones((), "float32"))
    erf = graph.make_node("Erf", node.input, name=f"{name}/erf")
    node.type = "Sub"
    graph.replace_inputs(node, [one.output[0], erf.output[0]])


def _name_inputs_and_outputs(graph, function):
    """Names inputs and outputs as the model does, and open first dimensions `"batch"`."""
    names = dict(zip((spec.name for spec in function.specs), function.inputs, strict=True))
    taken = set(names.values())
    for each, name in zip(graph.output, function.outputs, strict=True):
        # Tensors need different names, also an input and an output that users gave one name.
        names[each.name] = free_name(f"{name}_output" if name in taken else name, taken)
    _rename(graph, names)
    for each in [*graph.input, *graph.output]:
        dimensions = each.type.tensor_type.shape.dim
        if each.name in taken and dimensions and not dimensions[0].HasField("dim_value"):
            dimensions[0].dim_param = "batch"


def _rename(graph, names):
    """Renames tensors, also in graphs inside nodes; other tensors with the new names, too."""
    used = {name for node in all_nodes(graph) for name in [*node.input, *node.output]}
    used |= {each.name for each in graph.initializer}
    for name in used & set(names.values()) - names.keys():
        names[name] = free_name(f"{name}_inside", used)

    def rename(inner):
        for node in inner.node:
            node.input[:] = [names.get(name, name) for name in node.input]
            node.output[:] = [names.get(name, name) for name in node.output]
            for attribute in node.attribute:
                rename(attribute.g)
        for each in [*inner.input, *inner.output, *inner.value_info, *inner.initializer]:
            each.name = names.get(each.name, each.name)

    rename(graph)


def _captured(function):
    """Dictionary of name to array of constants that are not variables, e.g. of `Normalization`."""
    captured = function.captured_inputs
    inner = function.inputs[len(function.inputs) - len(captured) :]
    pairs = zip(inner, captured, strict=True)
    return {own.name: outer.numpy() for own, outer in pairs if outer.dtype != tf.resource}


def _make_initializers(graph, arrays):
    """Turns captured constants, which tf2onnx makes inputs, into initializers."""
    taken = {each.name for each in graph.input} & arrays.keys()
    _assign(graph.input, [each for each in graph.input if each.name not in taken])
    graph.initializer.extend(_tensor(name, arrays[name]) for name in sorted(taken))


def replace_kernels(graph, kernels, make):
    """Replaces the inputs that are kernels by nodes.

    Transpositions and reshapes of a kernel are applied to it and removed.

    Args:
        graph: `onnx.GraphProto`, changed in place.
        kernels: Dictionary of names of inputs to `StoredKernel`.
        make: Function of a `StoredKernel` and the name of the tensor of its levels. It returns a
            dictionary of names to arrays, which become initializers, and a list of nodes.

    Returns:
        Dictionary of the names of the tensors of levels to `StoredKernel`, moved.
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
    """Yields the nodes of a graph, and of the graphs inside their attributes."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from all_nodes(attribute.g)


def _carry_out_moves(graph, name, kernel):
    """Applies the moves after a kernel to it; returns the name of the last tensor, and it."""
    constants = {each.name: each for each in graph.initializer}
    while True:
        users = [node for node in all_nodes(graph) if name in node.input]
        move = _move(users[0], constants) if len(users) == 1 else None
        if move is None or users[0] not in graph.node:
            return name, kernel
        graph.node.remove(users[0])
        kernel, name = kernel.moved(move), users[0].output[0]


def _move(node, constants):
    """Function of arrays that a node computes if it only moves elements, else None."""
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
