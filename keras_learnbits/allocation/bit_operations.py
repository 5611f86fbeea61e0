"""`BitOperationsTarget`: weights and activations under one budget of bit operations."""

from typing import NamedTuple

import numpy as np

from keras_learnbits.allocation import exact
from keras_learnbits.allocation.targets import WIDTHS, SizeTarget
from keras_learnbits.inspection.operations import operations
from keras_learnbits.layers.discovery import quantized_kernels, unique_names


class BitOperationsTarget(SizeTarget):
    """Bit operations of one example: MACs times bits of the weights times bits of the inputs.

    Bits of weights and of activations are allocated together, exactly. Training does not change
    them, because the price that would move them is one per weight or value, not per operation.
    """

    name, unit = "target_bit_operations", "bit operations per example"
    frozen_from_start = True

    def limit(self, model):
        return int(self.value)

    def sizes(self, kernels, bits):
        # Operations per bit of a weight, at the present bits of the inputs.
        slopes = [
            self._operations[kernel].macs * int(self._operations[kernel].input.integer_bits())
            if self._operations[kernel].macs
            else 0
            for kernel in kernels
        ]
        return np.outer(slopes, bits)

    def begin(self, model):
        self._start, self._at_target = None, False
        self._limit = self.limit(model)
        self._find(model)
        lowest = sum(
            each.macs * kernel.layer.min_bits * each.input.layer.min_bits
            for kernel, each in self._operations.items()
            if each.macs
        )
        self._check(lowest, model)

    def allocate_by(self, model, tensors, losses):
        """Like `SizeTarget.allocate_by`, but for kernels and activations."""
        self._find(model)
        groups = self._groups(model, tensors, losses)
        options = [group_options(group.kernel_losses, group.macs, group.input_losses)
                   for group in groups]  # fmt: skip
        longest = max(len(each.costs) for each in options)
        costs = np.array([_padded(each.costs, longest, each.costs[-1]) for each in options])
        gains = np.array([_padded(each.losses, longest, np.inf) for each in options])
        self._check(exact.smallest_size(gains, costs), model)
        found = {}
        chosen = exact.allocate(gains, costs, self.limit(model))
        for group, each, choice in zip(groups, options, chosen, strict=True):
            widths = dict(zip([group.input, *group.kernels], each.widths[choice], strict=True))
            found |= {tensor: int(bits) for tensor, bits in widths.items() if tensor in tensors}
        return found

    def _check(self, smallest, model):
        if smallest > self.limit(model):
            raise ValueError(
                f"`{self.name}` must be feasible; the lowest bit-widths reach: {smallest} "
                f"{self.unit}. Received: {self.name}={self.value}"
            )

    def _find(self, model):
        """Finds the operations of all kernels.

        Raises:
            ValueError: The operations of a kernel are not known, or its input is not quantized.
        """
        kernels, known = quantized_kernels(model), operations(model)
        unknown = [
            name
            for kernel, name in zip(kernels, unique_names(kernels), strict=True)
            if kernel not in known or (known[kernel].macs and known[kernel].input is None)
        ]
        if unknown:
            raise ValueError(
                f"`{self.name}` needs kernels whose multiplications are known, with quantized "
                "inputs: convert a functional model with `activations=True`, and exclude "
                f"recurrent, attention and separable layers. Received: kernels {unknown}"
            )
        self._operations = known

    def _groups(self, model, tensors, losses):
        """The kernels that read each activation, with the losses at each width.

        Tensors that are not given keep their widths.
        """
        rows = {tensor: row for tensor, row in zip(tensors, losses, strict=True)}

        def row_of(tensor):
            if tensor in rows:
                return rows[tensor]
            kept = np.full(len(WIDTHS), np.inf)
            kept[0 if tensor is None else int(tensor.integer_bits()) - 1] = 0.0
            return kept

        readers = {}
        for kernel, each in self._operations.items():
            readers.setdefault(each.input, []).append(kernel)
        return [
            _Group(
                input=source,
                kernels=kernels,
                macs=[self._operations[kernel].macs for kernel in kernels],
                input_losses=row_of(source),
                kernel_losses=[row_of(kernel) for kernel in kernels],
            )
            for source, kernels in readers.items()
        ]


class _Group(NamedTuple):
    """An activation, or None, and the kernels that read it."""

    input: object
    kernels: list
    macs: list
    input_losses: np.ndarray
    kernel_losses: list


class Options(NamedTuple):
    """Pareto-optimal combinations of widths, of one activation and the kernels that read it.

    Attributes:
        costs: Integers, ascending.
        losses: Floats, descending.
        widths: Integers of shape `(options, 1 + kernels)`, first the width of the activation.
    """

    costs: np.ndarray
    losses: np.ndarray
    widths: np.ndarray


def group_options(kernel_losses, macs, input_losses):
    """Combinations of widths, of an activation and the kernels that read it, that can be optimal.

    Args:
        kernel_losses: List of arrays, the loss at 1, 2, ... bits for each kernel; `inf` forbids a
            width.
        macs: List of integers, multiply-accumulates of each kernel.
        input_losses: Array, the loss at 1, 2, ... bits of the activation.

    Returns:
        `Options`; costs are bit operations.

    Examples:
        >>> inf = np.inf
        >>> options = group_options([np.array([4.0, 0.0])], [10], np.array([inf, 1.0]))
        >>> options.costs.tolist(), options.losses.tolist(), options.widths.tolist()
        ([20, 40], [5.0, 1.0], [[2, 1], [2, 2]])
    """
    options = Options(np.zeros(1, "int64"), np.zeros(1), np.zeros((1, 0), "int64"))
    for losses, number in zip(kernel_losses, macs, strict=True):
        allowed = np.flatnonzero(np.isfinite(losses))
        options = _best(
            np.add.outer(options.costs, number * (allowed + 1)).ravel(),
            np.add.outer(options.losses, losses[allowed]).ravel(),
            np.column_stack(
                [
                    np.repeat(options.widths, len(allowed), axis=0),
                    np.tile(allowed + 1, len(options.costs)),
                ]
            ),
        )
    allowed = np.flatnonzero(np.isfinite(input_losses))
    return _best(
        np.outer(allowed + 1, options.costs).ravel(),
        np.add.outer(input_losses[allowed], options.losses).ravel(),
        np.column_stack(
            [
                np.repeat(allowed + 1, len(options.costs)),
                np.tile(options.widths, (len(allowed), 1)),
            ]
        ),
    )


def _best(costs, losses, widths):
    """`Options` without the dominated ones."""
    order = np.lexsort((losses, costs))
    before = np.minimum.accumulate(np.append(np.inf, losses[order][:-1]))
    order = order[losses[order] < before]
    return Options(costs[order], losses[order], widths[order])


def _padded(values, length, filler):
    return np.append(values, np.full(length - len(values), filler, values.dtype))
