"""Quantized activations of an ONNX graph as `Quant` nodes of QONNX."""

import numpy as np

from keras_learnbits.export._extra import import_extra
from keras_learnbits.export._onnx_graph import all_nodes

DOMAIN = "qonnx.custom_op.general"
# `Quant` rounds halves away from zero with this mode, which is up for numbers that are not
# negative: https://github.com/fastmachinelearning/qonnx (docs/qonnx-custom-ops/quant_op.md)
HALF_UP = "HALF_UP"


def use_quant_nodes(graph, grids, zero_point):
    """Replaces the nodes of each quantized activation by one `Quant` node.

    tf2onnx writes `LearnedBitActivation.plain` as Mul, Add, Floor, Min, Max and Mul (or Clip
    instead of Min and Max). Codes of a signed activation are shifted to numbers that are not
    negative, because `Quant` rounds halves of negative numbers down. Without a zero point signed
    activations are not replaced.

    Args:
        graph: `onnx.GraphProto`, changed in place.
        grids: List of `ActivationGrid`, those of the model.
        zero_point: Whether `Quant` nodes may have a zero point other than 0.

    Returns:
        List of the names of the quantized tensors.
    """
    helper, numpy_helper = import_extra("onnx.helper", "onnx.numpy_helper")
    constants = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "Gemm"]:
        _split(graph, node, constants)
    constants = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    made = []
    for floor in [node for node in graph.node if node.op_type == "Floor"]:
        found = _activation(graph, floor, constants, grids)
        if found is None or (found.grid.signed and not zero_point):
            continue
        grid, name = found.grid, found.nodes[-1].output[0]
        values = {
            "scale": np.float32(grid.step),
            "zero_point": np.float32(-grid.lowest_code),
            "bits": np.float32(grid.bits),
        }
        for key, value in values.items():
            graph.initializer.append(numpy_helper.from_array(np.asarray(value), f"{name}/{key}"))
        inputs = [found.source, *(f"{name}/{key}" for key in values)]
        attributes = {"signed": 0, "narrow": 0, "rounding_mode": HALF_UP}
        quant = helper.make_node(
            "Quant", inputs, [name], name=f"{name}/quant", domain=DOMAIN, **attributes
        )
        graph.node.insert(list(graph.node).index(found.nodes[-1]), quant)
        for node in found.nodes:
            graph.node.remove(node)
        made.append(name)
    used = {name for node in all_nodes(graph) for name in node.input}
    kept = [each for each in graph.initializer if each.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return made


def _split(graph, gemm, constants):
    """Replaces a Gemm by MatMul, Mul and Add if tf2onnx has fused an activation's first steps."""
    helper, numpy_helper = import_extra("onnx.helper", "onnx.numpy_helper")
    settings = {each.name: helper.get_attribute_value(each) for each in gemm.attribute}
    factor = settings.pop("alpha", 1.0)
    half = constants.get(gemm.input[2]) if len(gemm.input) > 2 else None
    plain = settings.get("beta", 1.0) == 1.0 and not settings.get("transA", 0)
    if half is None or half.size != 1 or half != 0.5 or not plain or settings.get("transB", 0):
        return
    (output,) = gemm.output
    names = [f"{output}/{part}" for part in ("product", "factor", "scaled", "half")]
    for name, value in zip(names[1::2], (factor, 0.5), strict=True):
        array = np.asarray(value, "float32")
        graph.initializer.append(numpy_helper.from_array(array, name))
    nodes = [
        helper.make_node("MatMul", gemm.input[:2], [names[0]]),
        helper.make_node("Mul", names[:2], [names[2]]),
        helper.make_node("Add", names[2:], [output]),
    ]
    index = list(graph.node).index(gemm)
    graph.node.remove(gemm)
    for node in reversed(nodes):
        graph.node.insert(index, node)


class _Found:
    """The nodes of a quantized activation, its input, and its grid."""

    def __init__(self, nodes, source, grid):
        self.nodes, self.source, self.grid = nodes, source, grid


def _activation(graph, floor, constants, grids):
    """The activation that a Floor node is part of, or None."""
    makers = {name: node for node in graph.node for name in node.output}
    users = {}
    for node in all_nodes(graph):
        for name in node.input:
            users.setdefault(name, []).append(node)

    def constant_of(node):
        values = [constants[name] for name in node.input if name in constants]
        return float(values[0]) if values and values[0].size == 1 else None

    add = makers.get(floor.input[0])
    multiply = None if add is None else makers.get(next(iter(add.input)))
    if add is None or add.op_type != "Add" or multiply is None or multiply.op_type != "Mul":
        return None
    if constant_of(add) != 0.5:
        return None
    nodes, bounds, last = [multiply, add, floor], [], floor
    while True:
        following = users.get(last.output[0], [])
        if len(following) != 1:
            return None
        last = following[0]
        nodes.append(last)
        if last.op_type == "Mul":
            break
        if last.op_type not in ("Min", "Max", "Clip"):
            return None
        bounds += [
            v.item() for n in last.input if (v := constants.get(n)) is not None and v.size == 1
        ]
    step = constant_of(last)
    source = [name for name in multiply.input if name not in constants]
    for grid in grids:
        if (
            step == float(grid.step)
            and sorted(bounds) == [grid.lowest_code, grid.highest_code]
            and constant_of(multiply) == float(np.float32(1.0) / grid.step)
            and len(source) == 1
        ):
            return _Found(nodes, source[0], grid)
    return None


def expand_quant_nodes(graph, constants):
    """Replaces `Quant` nodes of activations by standard operators, for onnxruntime.

    They compute `Quant` as QONNX defines it: scaled, shifted, rounded with halves away from zero,
    clipped to `0 .. 2**bits - 1`, and back.

    Args:
        graph: `onnx.GraphProto`, changed in place.
        constants: Dictionary of names of initializers to arrays.
    """
    for node in [each for each in graph.node if each.domain == DOMAIN]:
        index = list(graph.node).index(node)
        graph.node.remove(node)
        for each in reversed(_expanded(graph, node, int(constants[node.input[3]]))):
            graph.node.insert(index, each)


def _expanded(graph, node, bits):
    """The nodes that compute a `Quant` node of unsigned codes; their constants are added."""
    helper, numpy_helper = import_extra("onnx.helper", "onnx.numpy_helper")
    source, scale, zero, _ = node.input
    (output,) = node.output
    nodes = []

    def constant(name, value):
        array = np.asarray(value, "float32")
        graph.initializer.append(numpy_helper.from_array(array, f"{output}/{name}"))
        return f"{output}/{name}"

    def step(kind, *inputs, to=None):
        to = to or f"{output}/{kind}"
        nodes.append(helper.make_node(kind, list(inputs), [to]))
        return to

    shifted = step("Add", step("Div", source, scale), zero)
    magnitude = step("Floor", step("Sum", step("Abs", shifted), constant("half", 0.5)))
    rounded = step("Mul", step("Sign", shifted), magnitude)
    codes = step("Clip", rounded, constant("low", 0.0), constant("high", 2.0**bits - 1))
    step("Mul", step("Sub", codes, zero), scale, to=output)
    return nodes
