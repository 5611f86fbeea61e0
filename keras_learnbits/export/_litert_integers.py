"""Whole-integer arithmetic in a LiteRT graph with quantized activations.

LiteRT's converter writes a quantized activation as QUANTIZE and DEQUANTIZE, with float operators
between them. An operator whose input comes from a DEQUANTIZE and whose output goes to a QUANTIZE
alone is computed in integers instead, as LiteRT's specification says:
https://ai.google.dev/edge/litert/models/quantization_spec

An activation of B bits has `2**B` codes, and int8 has 256. The highest code is mapped to 127, where
integer operators saturate, so clipping from above is free. From below, an unsigned activation is
clipped by a fused ReLU. A signed one of fewer than 8 bits is quantized twice: first with its lowest
code at -128, where the operator saturates, too.
"""

import numpy as np

from keras_learnbits.export._litert_graph import FILTER_AXES

LOWEST, HIGHEST = -128, 127
# Operators that move values, take a maximum or add zeros. They commute with rounding.
MONOTONE = ("MAX_POOL_2D", "PAD", "RESHAPE")
# Operators with a filter that XNNPACK computes in integers.
WITH_FILTER = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")


def zero_point_of(grid):
    """The int8 integer of 0, with the highest code of an `ActivationGrid` at 127."""
    return HIGHEST - grid.highest_code


class LiteRTIntegers:
    """Rewrites a graph so that operators between quantized activations compute in integers.

    Args:
        graph: `LiteRTGraph`, edited in place.
        grid: Function of a scale that the converter has written to the `ActivationGrid`.
        find_integers: Function of a filter and the axis of its channels to an `IntegerFilter` of at
            most 8 bits, or None.
    """

    def __init__(self, graph, grid, find_integers):
        self.graph = graph
        self.find_integers = find_integers
        self.used = {}  # kernels whose operators compute in integers
        self._grid_of = {}
        for operator in graph.operators_of("QUANTIZE"):
            output = int(operator.outputs[0])
            self._grid_of[output] = exact = grid(graph.tensor(output).quantization.scale[0])
            graph.set_quantized(output, exact.step, zero_point_of(exact))

    def rewrite(self):
        """Rewrites as many operators as possible."""
        for quantize in self.graph.operators_of("QUANTIZE"):
            quantize = self._moved_up(quantize)
            grid = self._grid_of[int(quantize.outputs[0])]
            if not self._fused(quantize) and not _saturates(grid):
                self._quantize_twice(quantize)
        for dequantize in self.graph.operators_of("DEQUANTIZE"):
            (output,) = map(int, dequantize.outputs)
            if not self.graph.users(output) and output not in self.graph.graph.outputs:
                self.graph.remove(dequantize)

    def _producer(self, index):
        return next((each for each in self.graph.graph.operators if index in each.outputs), None)

    def _integers_behind(self, index):
        """The int8 tensor of which a tensor is the DEQUANTIZE, or None."""
        producer = self._producer(index)
        if producer is None or self.graph.kind_of(producer) != "DEQUANTIZE":
            return None
        integers = int(producer.inputs[0])
        return integers if integers in self._grid_of else None

    def _moved_up(self, quantize):
        """Moves a QUANTIZE before the operators that commute with it; returns the first one."""
        while True:
            index = int(quantize.inputs[0])
            producer = self._producer(index)
            if producer is None or not self.graph.is_read_once(index):
                return quantize
            if self.graph.kind_of(producer) not in MONOTONE:
                return quantize
            before, after = int(producer.inputs[0]), int(quantize.outputs[0])
            if not self.graph.is_read_once(before):
                return quantize
            grid = self._grid_of[after]
            integers = self.graph.add_result(f"{grid.name}/before", before, "INT8")
            self.graph.set_quantized(integers, grid.step, zero_point_of(grid))
            self._grid_of[integers] = grid
            producer.inputs = [integers, *map(int, producer.inputs[1:])]
            producer.outputs = [after]
            quantize.inputs, quantize.outputs = [before], [integers]
            self.graph.move_before(quantize, producer)

    def _fused(self, quantize):
        """Computes the operator before a QUANTIZE in integers; returns whether it can be."""
        index, output = int(quantize.inputs[0]), int(quantize.outputs[0])
        operator, grid = self._producer(index), self._grid_of[output]
        if operator is None or not self.graph.is_read_once(index):
            return False
        kind = self.graph.kind_of(operator)
        if kind == "ADD":
            integers = [self._integers_behind(int(each)) for each in operator.inputs]
            if None in integers:
                return False
            operator.inputs = integers
        elif kind in WITH_FILTER:
            if not self._filter_in_integers(operator, FILTER_AXES[kind]):
                return False
        else:
            return False
        self._clip(operator, grid, output)
        return True

    def _filter_in_integers(self, operator, axis):
        """Gives an operator integer inputs, filter and bias, if they exist."""
        inputs = [int(each) for each in operator.inputs]
        integers, array = self._integers_behind(inputs[0]), self.graph.constant(inputs[1])
        if integers is None or array is None or len(self.graph.users(inputs[1])) > 1:
            return False
        found = self.find_integers(array, axis)
        bias = self.graph.constant(inputs[2]) if len(inputs) > 2 and inputs[2] >= 0 else None
        if found is None or (bias is None and len(inputs) > 2 and inputs[2] >= 0):
            return False
        found = found.stretched()
        if bias is None:
            bias = np.zeros(found.scale.shape, "float32")
        step = self._grid_of[integers].step
        found, bias, bias_scale = found.with_integer_bias(bias, step, axis)
        name = found.kernel.name
        operator.inputs = [
            integers,
            self.graph.add_integers(f"{name}/codes", found.integers, 8, found.scale, axis),
            self.graph.add_bias(f"{name}/bias", bias, bias_scale),
        ]
        self.used[name] = "int8", "int8", found.note
        return True

    def _clip(self, operator, grid, output):
        """Makes an integer operator write an activation, clipped to the grid's range."""
        if not grid.signed:
            self.graph.fuse_relu(operator)
        elif not _saturates(grid):
            first = self._lowest_first(grid, output)
            operator.outputs = [first]
            self._replace_quantize(output, self.graph.operator("QUANTIZE", [first], output))
            return
        operator.outputs = [output]
        self._replace_quantize(output, None)

    def _quantize_twice(self, quantize):
        """Also clips the output of a QUANTIZE at the lowest code."""
        output = int(quantize.outputs[0])
        first = self._lowest_first(self._grid_of[output], output)
        quantize.outputs = [first]
        self.graph.insert_after(quantize, self.graph.operator("QUANTIZE", [first], output))

    def _lowest_first(self, grid, output):
        """A tensor like an activation with its lowest code at -128."""
        first = self.graph.add_result(f"{grid.name}/lowest", output, "INT8")
        self.graph.set_quantized(first, grid.step, LOWEST - grid.lowest_code)
        return first

    def _replace_quantize(self, output, new):
        """Replaces the QUANTIZE of float inputs that writes a tensor by another one, or by none."""
        old = next(
            each
            for each in self.graph.operators_of("QUANTIZE")
            if int(each.outputs[0]) == output and each is not new
        )
        if new is not None:
            self.graph.insert_after(old, new)
        self.graph.remove(old)


def _saturates(grid):
    """Whether the lowest code is -128, so that int8 operators saturate there."""
    return zero_point_of(grid) + grid.lowest_code == LOWEST
