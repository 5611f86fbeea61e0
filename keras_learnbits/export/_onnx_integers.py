"""Integer arithmetic in an ONNX graph with quantized activations.

onnxruntime replaces DequantizeLinear, an operator and QuantizeLinear by an integer operator. It
does so for a Conv whose filter comes from a DequantizeLinear of int8 per channel, and whose bias is
an int32 at the product of the scales; and for a MatMul also without QuantizeLinear:
https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html

An activation of B bits has the codes `0 .. 2**B - 1`, as uint8. QuantizeLinear saturates at 0; with
fewer than 8 bits the highest code is clipped.

On x86 processors without VNNI, onnxruntime and OpenVINO add two products of uint8 and int8 in an
int16, which saturates. Filters are kept so small that no such sum is too large, as the runtimes
advise: with activations of 8 bits they have 7 (`reduce_range` in the link above;
https://docs.openvino.ai/latest/pot_saturation_issue.html).
"""

import numpy as np

from keras_learnbits.export._extra import import_extra
from keras_learnbits.export._filters import LARGEST

# Operators with a filter, and the axes of the output channels in the filter and in the output.
FILTERS = {"Conv": (0, 1), "MatMul": (1, -1)}
# Operators that commute with the rounding of an activation (Relu: of an unsigned one).
COMMUTING = ("Relu", "MaxPool", "ReduceMax", "Transpose", "Reshape", "Flatten")
# The largest sum of two products in an int16.
LARGEST_PAIR = 2**15 - 1


def largest_weight(grid):
    """The magnitude of int8 weights below which no sum of two products with codes saturates.

    Examples:
        >>> from keras_learnbits.export._activations import ActivationGrid
        >>> [largest_weight(ActivationGrid("x", bits, 1.0, signed=False)) for bits in (8, 7, 4)]
        [64, 127, 127]
    """
    return min(LARGEST, LARGEST_PAIR // (2 * (2**grid.bits - 1)))


def zero_point_of(grid):
    """The uint8 integer of 0, with the lowest code of an `ActivationGrid` at 0."""
    return -grid.lowest_code


class OnnxIntegers:
    """Rewrites a graph so that operators of quantized activations compute in integers.

    Args:
        graph: `onnx.GraphProto`, edited in place.
        grid: Function of a scale that the converter has written to the `ActivationGrid`.
        find_integers: Function of a filter, the axis of its channels and the largest magnitude of
            an integer to an `IntegerFilter`, or None.

    Attributes:
        used: Dictionary of the name of a kernel to its stored type, arithmetic, and a note.
    """

    def __init__(self, graph, grid, find_integers):
        self.helper, self.numpy_helper = import_extra("onnx.helper", "onnx.numpy_helper")
        self.graph = graph
        self.grid = grid
        self.find_integers = find_integers
        self.used = {}
        self._grids = {}  # names of dequantized activations to their grids
        self._added = 0

    def rewrite(self):
        """Rewrites as many operators as possible."""
        for node in [n for n in self.graph.node if n.op_type in FILTERS]:
            self._fold_affine(node)
        for node in [n for n in self.graph.node if n.op_type == "QuantizeLinear"]:
            self._set_grid(node)
        for node in [n for n in self.graph.node if n.op_type == "Pad"]:
            self._fold_zeros(node)
        for node in [n for n in self.graph.node if n.op_type in FILTERS]:
            self._use_integers(node)
        self._drop_unread()
        del self.graph.value_info[:]  # shapes inferred before zeros were padded elsewhere

    def constant(self, name):
        """The array of an initializer, or None."""
        found = next((each for each in self.graph.initializer if each.name == name), None)
        return None if found is None else self.numpy_helper.to_array(found)

    def _users(self, name):
        return [node for node in self.graph.node if name in node.input]

    def _is_output(self, name):
        return any(name == each.name for each in self.graph.output)

    def _add(self, array, name):
        """Adds an initializer; returns its name."""
        self._added += 1
        name = f"{name}/{self._added}"
        tensor = self.numpy_helper.from_array(np.asarray(array, order="C"), name)
        self.graph.initializer.append(tensor)
        return name

    def _insert(self, kind, inputs, outputs, before=None, after=None, **attributes):
        """Inserts a node before or after another one."""
        node = self.helper.make_node(kind, inputs, outputs, **attributes)
        index = next(i for i, each in enumerate(self.graph.node) if each is (before or after))
        self.graph.node.insert(index + (after is not None), node)

    def _fold_affine(self, node):
        """Folds a Mul and an Add of a constant per channel after an operator into its filter.

        Positive factors commute with a MaxPool between them.
        """
        filter_axis, output_axis = FILTERS[node.op_type]
        array = self.constant(node.input[1])
        if array is None or len(self._users(node.input[1])) > 1:
            return
        bias = self.constant(node.input[2]) if len(node.input) > 2 else None
        bias = np.zeros(array.shape[filter_axis], "float32") if bias is None else bias
        last = node
        while True:
            following = self._users(last.output[0])
            if len(following) != 1 or self._is_output(last.output[0]):
                break
            if following[0].op_type == "MaxPool":
                last = following[0]
                continue
            values = self._affine(following[0], last.output[0], bias.size, output_axis, array.ndim)
            if values is None or (last is not node and np.any(values[0] <= 0)):
                break
            factor, shift = values
            shape = [-1 if axis == filter_axis else 1 for axis in range(array.ndim)]
            array, bias = array * factor.reshape(shape), bias * factor + shift
            last.output[0] = following[0].output[0]
            self.graph.node.remove(following[0])
        if np.any(bias) or len(node.input) > 2:
            node.input[1] = self._add(array.astype("float32"), f"{node.name}/filter")
            self._set_bias(node, bias.astype("float32"))

    def _affine(self, node, name, channels, axis, rank):
        """Factor and shift per channel that a node applies to a tensor; None if it is another."""
        if node.op_type not in ("Mul", "Add"):
            return None
        other = next((each for each in node.input if each != name), name)
        constant = self.constant(other)
        values = None if constant is None else _per_channel(constant, channels, axis, rank)
        if values is None:
            return None
        ones = np.ones(channels, "float32")
        return (values, 0 * ones) if node.op_type == "Mul" else (ones, values)

    def _set_bias(self, node, bias):
        """Gives an operator a float bias: an input of Conv, an Add after MatMul."""
        name = self._add(bias, f"{node.name}/bias")
        if node.op_type == "Conv":
            del node.input[2:]
            node.input.append(name)
        else:
            output = node.output[0]
            node.output[0] = f"{node.name}/product"
            self._insert("Add", [node.output[0], name], [output], after=node)

    def _set_grid(self, node):
        """Gives a QuantizeLinear the exact grid of its activation, and clips it from above."""
        grid = self.grid(self.constant(node.input[1]))
        scale = self._add(np.float32(grid.step), f"{grid.name}/step")
        zero = self._add(np.uint8(zero_point_of(grid)), f"{grid.name}/zero_point")
        readers, decoders = self._users(node.output[0]), self._decoders(node.output[0])
        for each in [node, *decoders]:
            each.input[1], each.input[2] = scale, zero
        if grid.bits < 8:
            clipped = f"{node.output[0]}/clipped"
            bounds = [
                self._add(np.uint8(each), f"{grid.name}/bound") for each in (0, 2**grid.bits - 1)
            ]
            self._insert("Clip", [node.output[0], *bounds], [clipped], after=node)
            for each in readers:
                each.input[0] = clipped
        for each in decoders:
            self._grids[each.output[0]] = grid

    def _decoders(self, name):
        """The DequantizeLinear nodes that read integers, directly or once they were moved."""
        found = []
        for node in self._users(name):
            found += (
                [node] if node.op_type == "DequantizeLinear" else self._decoders(node.output[0])
            )
        return found

    def _fold_zeros(self, pad):
        """Lets a Conv pad its quantized input with zeros, instead of a Pad before quantization.

        Zero is a level of every activation, so both give the same result.
        """
        attributes = {each.name: self.helper.get_attribute_value(each) for each in pad.attribute}
        amounts = self.constant(pad.input[1])
        value = self.constant(pad.input[2]) if len(pad.input) > 2 and pad.input[2] else 0.0
        is_zero = attributes.get("mode", b"constant") == b"constant" and value == 0
        if amounts is None or not is_zero or len([name for name in pad.input if name]) > 3:
            return
        batch_and_channels, spatial = amounts.reshape(2, -1)[:, :2], amounts.reshape(2, -1)[:, 2:]
        readers = self._behind_quantization(pad.output[0])
        if batch_and_channels.any() or not readers:
            return
        old = [_pads_of(self.helper, conv, spatial.shape[1]) for conv in readers]
        if any(pads is None for pads in old):
            return
        for conv, pads in zip(readers, old, strict=True):
            for each in [each for each in conv.attribute if each.name in ("pads", "auto_pad")]:
                conv.attribute.remove(each)
            pads = [int(each) for each in pads + spatial.reshape(-1)]
            conv.attribute.append(self.helper.make_attribute("pads", pads))
        for node in self._users(pad.output[0]):
            node.input[:] = [pad.input[0] if name == pad.output[0] else name for name in node.input]
        self.graph.node.remove(pad)

    def _behind_quantization(self, name):
        """The Convs that read a tensor once it is quantized, if nothing else reads it."""
        convs, names = [], [name]
        while names:
            name = names.pop()
            for node in self._users(name):
                if node.op_type in ("QuantizeLinear", "DequantizeLinear", "Clip"):
                    names.append(node.output[0])
                elif node.op_type == "Conv" and name in self._grids:
                    convs.append(node)
                else:
                    return []
        return convs

    def _use_integers(self, node):
        """Gives an operator with quantized inputs an integer filter and bias."""
        grid = self._grids.get(self._behind_moves(node.input[0]))
        array = self.constant(node.input[1])
        axis = FILTERS[node.op_type][0]
        if grid is None or array is None or array.ndim < 2 or len(self._users(node.input[1])) > 1:
            return
        quantize = self._quantized_by(node.output[0])
        if node.op_type == "Conv" and quantize is None:
            return  # onnxruntime would decode the filter at each call
        largest = largest_weight(grid)
        found = self.find_integers(array, axis, largest)
        if found is None:
            return
        if quantize is not None:
            self._quantize_at_once(node, quantize)
        found = found.stretched(largest)
        name = found.kernel.name
        if node.op_type == "Conv":
            bias = self.constant(node.input[2]) if len(node.input) > 2 else 0.0 * found.scale
            found, bias, bias_scale = found.with_integer_bias(bias, grid.step, axis)
            if len(node.input) < 3:
                node.input.append("")
            self._decode(node, 2, bias, bias_scale, 0, f"{name}/bias")
        self._decode(node, 1, found.integers.astype("int8"), found.scale, axis, f"{name}/codes")
        self.used[name] = "int8", "int8", found.note

    def _quantized_by(self, name):
        """The QuantizeLinear that is a tensor's only reader, after commuting nodes; or None."""
        users = [node for node in self._users(name) if node.op_type != "Shape"]
        if len(users) != 1 or self._is_output(name):
            return None
        if users[0].op_type in COMMUTING or self._upper_bound(users[0]) is not None:
            return self._quantized_by(users[0].output[0])
        return users[0] if users[0].op_type == "QuantizeLinear" else None

    def _quantize_at_once(self, node, quantize):
        """Quantizes the result of an operator directly after it, which onnxruntime's fusion needs.

        The later QuantizeLinear then receives exact levels and does not change them. A Relu before
        an unsigned activation is dropped, because the lowest code is that of 0.
        """
        output, (_, scale, zero) = node.output[0], quantize.input
        node.output[0] = f"{output}/float"
        codes, decoded = f"{output}/quantized", f"{output}/decoded"
        self._insert("DequantizeLinear", [codes, scale, zero], [decoded], after=node)
        (user,) = (each for each in self._users(output) if each.op_type != "Shape")
        highest = self._highest_code(quantize)
        old, bound = output, self._upper_bound(user)
        if not self.constant(zero).any() and (user.op_type == "Relu" or bound is not None):
            old = user.output[0]
            self.graph.node.remove(user)
            if bound is not None:
                highest = min(highest, int(np.rint(bound / self.constant(scale))))
        if highest < 255:
            unclipped = f"{output}/unclipped"
            bounds = [self._add(np.uint8(each), f"{output}/bound") for each in (0, highest)]
            self._insert("Clip", [unclipped, *bounds], [codes], after=node)
            codes = unclipped
        self._insert("QuantizeLinear", [node.output[0], scale, zero], [codes], after=node)
        for each in [*self._users(old), *self._users(output)]:
            each.input[:] = [decoded if name in (old, output) else name for name in each.input]

    def _upper_bound(self, node):
        """The upper bound of a Clip whose lower bound is 0, as in ReLU6; None for other nodes.

        It commutes with the rounding of an unsigned activation.
        """
        if node.op_type != "Clip" or len(node.input) < 3:
            return None
        low, high = (self.constant(name) for name in node.input[1:3])
        if low is None or high is None or low != 0 or low.dtype != np.float32:
            return None
        return float(high)

    def _highest_code(self, quantize):
        """The highest code that a QuantizeLinear and the Clip after it leave."""
        following = self._users(quantize.output[0])[0]
        return int(self.constant(following.input[2])) if following.op_type == "Clip" else 255

    def _behind_moves(self, name):
        """The tensor before the transpositions and reshapes that lead to a tensor."""
        while name not in self._grids:
            producer = next((node for node in self.graph.node if name in node.output), None)
            if producer is None or producer.op_type not in ("Transpose", "Reshape", "Flatten"):
                return name
            name = producer.input[0]
        return name

    def _decode(self, node, position, integers, scale, axis, name):
        """Makes an operator read integers through a DequantizeLinear with one scale per channel."""
        integers, scale = self._add(integers, name), self._add(scale, f"{name}/scale")
        output = f"{name}/decoded/{self._added}"
        self._insert("DequantizeLinear", [integers, scale], [output], before=node, axis=axis)
        node.input[position] = output

    def _drop_unread(self):
        """Removes the initializers that nothing reads any more."""
        read = {name for node in self.graph.node for name in node.input}
        for each in [each for each in self.graph.initializer if each.name not in read]:
            self.graph.initializer.remove(each)


def _pads_of(helper, conv, axes):
    """The numbers of zeros before and after each axis that a Conv adds; None if they are open."""
    attributes = {each.name: helper.get_attribute_value(each) for each in conv.attribute}
    if attributes.get("auto_pad", b"NOTSET") == b"VALID":
        return np.zeros(2 * axes, "int64")
    if attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
        return None
    return np.array(attributes.get("pads", [0] * 2 * axes))


def _per_channel(constant, channels, axis, rank):
    """A constant that broadcasts along the channels of an output, one number each; else None.

    Args:
        constant: Array.
        channels: Number of channels.
        axis: Axis of the channels: 1, or -1.
        rank: Number of axes of the output.
    """
    shape = (1,) * (rank - constant.ndim) + constant.shape
    wanted = [1] * rank
    wanted[axis] = channels
    if constant.ndim > rank or not (constant.size == 1 or list(shape) == wanted):
        return None
    return np.broadcast_to(constant.reshape(-1), (channels,))
