"""Targets of `BitBudget`: sizes in bits or bytes."""

import contextlib

import numpy as np

from keras_learnbits.allocation import exact
from keras_learnbits.inspection.bit_table import bit_table
from keras_learnbits.layers.discovery import kernels_among, quantized_kernels
from keras_learnbits.numerics import grids

WIDTHS = np.arange(grids.MIN_BITS, grids.MAX_BITS + 1)
# If the size is between this share of the target and the target, it is close enough, and the price
# is kept. Otherwise the price would change at each update, because integer widths rarely meet a
# target exactly.
SLACK = 0.97


class Target:
    """Base class of the targets of a `BitBudget`.

    Attributes:
        frozen_from_start: Whether bits are allocated before the first step only, from the budget's
            `start`, and stay. False by default.
    """

    frozen_from_start = False

    def begin(self, model):
        """Prepares for training, once the model is built.

        Raises:
            ValueError: The model cannot meet the target.
        """

    def begin_epoch(self, model):
        """Sets the price at the start of an epoch, while bits move."""

    def steer(self, model, progress, by):
        """Sets the price within an epoch, while bits move.

        Args:
            model: The model.
            progress: Fraction of the epochs that has passed.
            by: Fraction of the epochs at which the target is to be reached.
        """

    def permits(self, model):
        """Whether the current bit-widths meet the target."""
        raise NotImplementedError

    def allocate(self, model):
        """Integer bit-widths that meet the target: dictionary of trained kernel to integer."""
        raise NotImplementedError


class SizeTarget(Target):
    """A size that the model must not exceed, in any unit that is additive over layers.

    A subclass defines `limit` and `sizes`, and `rest` if the size has a constant part.

    Args:
        value: Number, the target.

    Attributes:
        name: Name of the target in error messages.
        unit: Unit of `value` in error messages; by default the name without `target_`.
    """

    name = "target"
    unit = ""

    def __init__(self, value):
        self.value = value

    def limit(self, model):
        """The largest size that meets the target, an integer in the unit of `sizes`."""
        raise NotImplementedError

    def sizes(self, kernels, bits):
        """Size of each kernel at each bit-width.

        Args:
            kernels: List of `QuantizedKernel`.
            bits: NumPy array of bit-widths, shape `(widths,)`.

        Returns:
            NumPy array of integers, shape `(kernels, widths)`.
        """
        raise NotImplementedError

    def rest(self, model):
        """The part of the size that does not depend on bit-widths, an integer."""
        return 0

    def describe(self, model, size):
        """A size in the unit of `value`, rounded so that the model can meet it, for messages."""
        return size

    def permits(self, model):
        return self._total(model) <= self._limit

    def begin(self, model):
        self._start, self._at_target = None, False
        self._count(model)

    def begin_at_target(self):
        """Records that bits have been set to the target, so that they stay near it.

        The final allocation is then as near as possible to the widths that training has reached,
        within one bit if that uses the target up, because weights were trained and losses were
        measured there.
        """
        self._at_target = True

    def steer(self, model, progress, by):
        # The schedule begins at the size and time at which this training begins or is resumed.
        size, since = self._start = self._start or (self._total(model), progress)
        # A layer that was not probed yet is predicted from all others, which is too inaccurate for
        # the price. At the target it is used nevertheless: the compiled price would move bits away.
        if not model.losses_are_known and not self._at_target:
            return
        self._count(model)
        kernels, prices, choices = descent(model)
        # The size decreases linearly until `by`.
        left = (by - progress) / (by - since) if progress < by else 0.0
        scheduled = self._limit + left * max(size - self._limit, 0)
        if not left and SLACK * self._limit <= self._present(kernels) + self._fixed <= self._limit:
            return
        totals = self._sizes_of(choices).sum(axis=1) + self._fixed
        within = np.flatnonzero(totals <= max(scheduled, totals[-1]))
        model.steer_price("bit_reg", price_at(prices, within[0]))

    def allocate(self, model):
        tensors, losses = self.predicted_losses(model)
        widths = self.allocate_by(model, tensors, losses)
        if not self._at_target:
            return widths
        size = self._allocated(widths)
        for reach in range(1, len(WIDTHS)):
            near = within(losses, _indices(tensors), reach)
            with contextlib.suppress(ValueError):  # they exceed the target
                widths = self.allocate_by(model, tensors, near)
                if self._allocated(widths) >= SLACK * size:
                    break
        return widths

    def predicted_losses(self, model):
        """The tensors whose bit-widths are allocated, and their losses, as `allocate_by` takes."""
        return predicted_losses(model)

    def allocate_by(self, model, kernels, losses):
        """Like `allocate`, but for given losses.

        Args:
            model: The model.
            kernels: List of `QuantizedKernel`; all other kernels keep their widths.
            losses: NumPy array of shape `(kernels, 16)`, the loss at 1, 2, ... bits; `inf` forbids
                a width.

        Raises:
            ValueError: The lowest widths exceed the target.
        """
        self._measure(model, kernels, losses)
        choices = exact.allocate(losses, self._table, self._limit - self._fixed)
        return {k: int(WIDTHS[choice]) for k, choice in zip(kernels, choices, strict=True)}

    def _count(self, model):
        """Computes the sizes of the kernels whose losses the model predicts.

        Returns:
            The results of `predicted_losses`.
        """
        kernels, losses = predicted_losses(model)
        self._measure(model, kernels, losses)
        return kernels, losses

    def _measure(self, model, kernels, losses):
        """Computes the sizes of kernels at each width, and the fixed size of all else."""
        self._limit = self.limit(model)
        self._table = self.sizes(kernels, WIDTHS)
        self._fixed = self._total(model) - self._present(kernels)
        smallest = exact.smallest_size(losses, self._table) + self._fixed
        if smallest > self._limit:
            unit = self.unit or self.name.removeprefix("target_")
            raise ValueError(
                f"`{self.name}` must be feasible; the lowest bit-widths reach: "
                f"{self.describe(model, smallest)} {unit}. "
                f"Received: {self.name}={self.value}"
            )

    def _total(self, model):
        kernels = quantized_kernels(model)
        table = self.sizes(kernels, WIDTHS)
        return self.rest(model) + table[np.arange(len(kernels)), _indices(kernels)].sum()

    def _sizes_of(self, choices):
        return self._table[np.arange(len(self._table)), choices]

    def _present(self, kernels):
        return self._sizes_of(_indices(kernels)).sum()

    def _allocated(self, widths):
        """The size of kernels at allocated widths."""
        return self._sizes_of(np.array(list(widths.values())) - 1).sum()


class BitsTarget(SizeTarget):
    """Mean bits per weight over all quantized kernels; sizes are in bits."""

    name, unit = "target_bits", "bits"

    def limit(self, model):
        # With a tolerance for products like `2.3 * 100`, which is a little less than 230.
        return int(np.floor(self.value * _weights(model) + 1e-9))

    def describe(self, model, size):
        return np.ceil(1e4 * size / _weights(model)) / 1e4

    def sizes(self, kernels, bits):
        return np.outer([kernel.size for kernel in kernels], bits)


class BytesTarget(SizeTarget):
    """Packed bytes of the whole model, as `bit_table` counts them."""

    name, unit = "target_bytes", "bytes"

    def limit(self, model):
        return int(self.value)

    def sizes(self, kernels, bits):
        # Rounded up: each kernel's codes fill whole bytes.
        return -(-np.outer([kernel.size for kernel in kernels], bits) // 8)

    def rest(self, model):
        table = bit_table(model)
        return table.packed_bytes - sum(row.code_bytes for row in table.rows)


class CompressionTarget(BytesTarget):
    """Float32 bytes divided by packed bytes."""

    name, unit = "target_compression", "times smaller"

    def limit(self, model):
        return int(bit_table(model).float_bytes / self.value + 1e-6)

    def describe(self, model, size):
        return np.floor(1e4 * bit_table(model).float_bytes / size) / 1e4


def predicted_losses(model):
    """The trained kernels, and their predicted losses at 1, 2, ... bits, shape `(kernels, 16)`.

    Raises:
        ValueError: There is no trained kernel, or losses are not predicted.
    """
    tensors, losses = model.predicted_losses()
    kernels = kernels_among(tensors)
    if not kernels:
        raise ValueError(
            "`BitBudget` needs a model with a trainable kernel that learns its bits. "
            f"Received: model={model.name!r}"
        )
    return kernels, losses[[tensors.index(kernel) for kernel in kernels]]


def within(losses, present, reach):
    """Losses with `inf` for widths too far from the present ones.

    Args:
        losses: Array of shape `(kernels, 16)`.
        present: Index of each kernel's present width.
        reach: Number of bits by which a width may change.

    Examples:
        >>> within(np.zeros((1, 5)), [3], reach=1).tolist()
        [[inf, inf, 0.0, 0.0, 0.0]]
    """
    distance = np.abs(np.arange(losses.shape[1]) - np.array(present)[:, None])
    return np.where(distance <= reach, losses, np.inf)


def descent(model):
    """The trained kernels, and the prices and choices of `exact.descent` for them."""
    kernels, losses = predicted_losses(model)
    everything = quantized_kernels(model)
    penalties = model.bit_objective.penalty_table(everything).numpy()
    penalties = penalties[[everything.index(kernel) for kernel in kernels]]
    return kernels, *exact.descent(losses, penalties.astype(np.float64))


def price_at(prices, step):
    """A price at which an allocation of the descent is the best one.

    Args:
        prices: Array of the lowest prices at which each allocation is the best one.
        step: Index of the allocation.
    """
    # In the middle, so that small errors of the predicted losses do not change the allocation.
    return float(prices[step] * 1.5 if step == len(prices) - 1 else prices[step : step + 2].mean())


def _weights(model):
    return sum(kernel.size for kernel in quantized_kernels(model))


def _indices(kernels):
    return [int(kernel.integer_bits()) - grids.MIN_BITS for kernel in kernels]
