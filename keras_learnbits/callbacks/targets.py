"""What a `BitBudget` aims at: a size in bits or bytes, or an accuracy.

A target is asked to `begin` on a built model, where it refuses what cannot be reached; to
`begin_epoch`; to `steer` the price once a share of the epochs has passed; whether it `permits` the
widths in use; and to `allocate` integers to the trained kernels.
"""

import re
import warnings

import keras
import numpy as np

from keras_learnbits.callbacks import allocation
from keras_learnbits.inspection.bit_table import bit_table
from keras_learnbits.layers.discovery import kernels_among, quantized_kernels
from keras_learnbits.numerics import grids

# A model this close below its target is left alone.
SLACK = 0.97


# Names of metrics, or of their classes, of which less is better.
FALLS = re.compile(
    "loss|error|entropy|divergence|hinge|poisson|false|perplexity|mse|mae|mape|msle|logcosh"
)


def _metrics(model):
    """All metrics of a compiled model, those that others hold, too."""
    return [each for metric in model.metrics for each in (metric, *getattr(metric, "metrics", ()))]


def _predicted_losses(model):
    """The trained kernels, and the predicted loss of each at each width; not activations."""
    tensors, losses = model.predicted_losses()
    kernels = kernels_among(tensors)
    if not kernels:
        raise ValueError(
            "`BitBudget` needs a model with a trainable kernel that learns its bits. "
            f"Received: model={model.name!r}"
        )
    return kernels, losses[[tensors.index(kernel) for kernel in kernels]]


def _descent(model):
    """Allocations of least predicted loss by price: kernels, prices, choices."""
    kernels, losses = _predicted_losses(model)
    everything = quantized_kernels(model)
    penalties = model.bit_objective.penalty_table(everything).numpy()
    penalties = penalties[[everything.index(kernel) for kernel in kernels]]
    return kernels, *allocation.descent(losses, penalties.astype(np.float64))


def _price_at(prices, step):
    """A price between those at which an allocation becomes the best and ceases to be."""
    return float(prices[step] * 1.5 if step == len(prices) - 1 else prices[step : step + 2].mean())


class SizeTarget:
    """A target for the size; a subclass says in what unit.

    Args:
        kind: Name of the argument that it was given as.
        value: The target.
        by: Share of the epochs at which it has come down.
    """

    def __init__(self, kind, value, by):
        self.kind = kind
        self.value = value
        self.by = by

    def limit(self, model):
        """The target in the unit of `sizes`, an integer."""
        raise NotImplementedError

    def as_target(self, model, size):
        """A size in the unit of `value`."""
        raise NotImplementedError

    def sizes(self, weights, bits):
        """Size of so many codes of so many bits."""
        raise NotImplementedError

    def total(self, model):
        """The present size of the model."""
        raise NotImplementedError

    def begin(self, model):
        self._start = None
        self._count(model)

    def _count(self, model):
        """Sizes of the trained kernels at each width, and of the rest: layers may be frozen."""
        kernels, losses = _predicted_losses(model)
        self._limit = self.limit(model)
        self._table = self.sizes(
            np.array([kernel.size for kernel in kernels])[:, None],
            np.arange(grids.MIN_BITS, grids.MAX_BITS + 1),
        )
        self._rest = self.total(model) - self._present(kernels)
        smallest = allocation.smallest_size(losses, self._table) + self._rest
        if smallest > self._limit:
            name = self.kind.removeprefix("target_")
            raise ValueError(
                f"`{self.kind}` must be within what the lowest bit-widths reach: "
                f"{self.as_target(model, smallest)} {name}. Received: {self.kind}={self.value}"
            )
        return kernels, losses

    def begin_epoch(self, model):
        pass

    def permits(self, model):
        return self.total(model) <= self._limit

    def steer(self, model, progress):
        # From where this training begins, or goes on after an interruption.
        size, since = self._start = self._start or (self.total(model), progress)
        if not model.losses_are_known:
            return
        self._count(model)
        kernels, prices, choices = _descent(model)
        left = (self.by - progress) / (self.by - since) if progress < self.by else 0.0
        scheduled = self._limit + left * max(size - self._limit, 0)
        if not left and SLACK * self._limit <= self._present(kernels) + self._rest <= self._limit:
            return
        totals = self._sizes_of(choices).sum(axis=1) + self._rest
        within = np.flatnonzero(totals <= max(scheduled, totals[-1]))
        model.steer_price("bit_reg", _price_at(prices, within[0]))

    def allocate(self, model):
        kernels, losses = self._count(model)
        return kernels, allocation.allocate(losses, self._table, self._limit - self._rest)

    def _sizes_of(self, choices):
        return self._table[np.arange(len(self._table)), choices]

    def _present(self, kernels):
        return self._sizes_of([int(kernel.integer_bits()) - 1 for kernel in kernels]).sum()


class _Bits(SizeTarget):
    """A target in mean bits per weight; sizes are in bits."""

    def limit(self, model):
        return int(np.floor(self.value * self._weights(model) + 1e-9))

    def as_target(self, model, size):
        return np.ceil(1e4 * size / self._weights(model)) / 1e4  # rounded, it would be too small

    def sizes(self, weights, bits):
        return weights * bits

    def total(self, model):
        return sum(k.size * int(k.integer_bits()) for k in quantized_kernels(model))

    def _weights(self, model):
        return sum(kernel.size for kernel in quantized_kernels(model))


class _Bytes(SizeTarget):
    """A target in packed bytes."""

    def limit(self, model):
        return int(self.value)

    def as_target(self, model, size):
        return size

    def sizes(self, weights, bits):
        return -(-weights * bits // 8)

    def total(self, model):
        return bit_table(model).packed_bytes


class _Compression(_Bytes):
    """A target for float32 bytes over packed bytes."""

    def limit(self, model):
        return int(bit_table(model).float_bytes / self.value + 1e-6)

    def as_target(self, model, size):
        return np.floor(1e4 * bit_table(model).float_bytes / size) / 1e4


SIZES = {"target_bits": _Bits, "target_bytes": _Bytes, "target_compression": _Compression}


class AccuracyTarget:
    """A target for a metric on validation data.

    Args:
        least: What the metric is to reach.
        data: Tuple `(x, y)` or dataset.
        metric: Name of the metric, higher is better.
    """

    def __init__(self, least, data, metric):
        self.least = least
        self.data = data
        self.metric = metric

    def begin(self, model):
        model.predicted_losses()
        logs = self._evaluate(model)
        if self.metric not in logs:
            raise ValueError(
                "`metric` must be one of the model's. "
                f"Received: metric={self.metric!r}, metrics={sorted(logs)}"
            )
        kind = next((type(m).__name__ for m in _metrics(model) if m.name == self.metric), "")
        if FALLS.search(f"{self.metric} {kind}".lower()):
            raise ValueError(
                "`metric` must be one of which more is better, as accuracy. "
                f"Received: metric={self.metric!r}"
            )

    def begin_epoch(self, model):
        if model.losses_are_known:
            _, prices, _, step = self._smallest_within(model)
            model.steer_price("bit_reg", _price_at(prices, step))

    def permits(self, model):
        return True  # they were chosen by it; weights have moved on with them since

    def steer(self, model, progress):
        pass

    def allocate(self, model):
        kernels, _, choices, step = self._smallest_within(model)
        return kernels, choices[step]

    def _smallest_within(self, model):
        """Bisects the allocations, by descending size, for the last that is accurate enough."""
        kernels, prices, choices = _descent(model)
        latent = [float(kernel.latent_bits()) for kernel in kernels]

        def accuracy(step):
            for kernel, choice in zip(kernels, choices[step], strict=True):
                kernel.bits.assign(float(choice + 1))
            return self._evaluate(model)[self.metric]

        try:
            highest = accuracy(0)
            if highest < self.least:
                warnings.warn(
                    f"Even at the highest bit-widths `{self.metric}` is {highest:.4f} on the "
                    f"validation data, below the {self.least:.4f} that the budget permits.",
                    stacklevel=2,
                )
            enough, too_few = 0, len(choices)
            while too_few - enough > 1:
                step = (enough + too_few) // 2
                enough, too_few = (
                    (step, too_few) if accuracy(step) >= self.least else (enough, step)
                )
        finally:
            for kernel, bits in zip(kernels, latent, strict=True):
                kernel.bits.assign(bits)
        return kernels, prices, choices, enough

    def _evaluate(self, model):
        data = self.data if isinstance(self.data, tuple) else (self.data,)
        x, y, weights = keras.utils.unpack_x_y_sample_weight(data)
        logs = model.evaluate(x, y, sample_weight=weights, verbose=0, return_dict=True)
        model.reset_metrics()
        return logs
