"""`BitBudget`: a target for the size or the accuracy in place of a price."""

import warnings

import keras
import numpy as np

from keras_learnbits import allocation, ops
from keras_learnbits.layers.tensors import activations_among, kernels_among, quantized_kernels
from keras_learnbits.report import bit_table

# A model this close below its target is left alone.
SLACK = 0.97


class BitBudget(keras.callbacks.Callback):
    """Steers the price of the bits so that a target is met, and meets it in the end.

    While bits move, the target comes down gradually from the model's size at the start, and
    `bit_reg` is set to the price at which the predicted losses ask for just that size: it is
    solved for each time, so nothing winds up; `fit` ends at the compiled one. When `FreezeBits`
    freezes the bits, or else at the end, integers are allocated exactly: the least predicted loss
    within the target, never above it, and so full that no layer has room for one more bit.

    `val_loss` rises with the price: compare epochs by `EarlyStopping("val_task_loss", mode="min")`.

    Sizes are those of the weights; the bits of activations follow the price. Give one target.
    Each `fit` begins with bits that move. Where a callback restores weights at the end of
    training, as `EarlyStopping` may, put the budget behind it: it restores the integers.

    Args:
        target_bits: Mean bits per weight, over all quantized kernels.
        target_bytes: Packed bytes of the whole model, as `bit_table` counts them: codes, scales,
            and float32 parameters.
        target_compression: Float32 bytes over packed bytes.
        max_accuracy_drop: How much lower than `float_accuracy` the accuracy on
            `validation_data` may be when the bits freeze, e.g. 0.005. The size then is as small
            as that allows.
        float_accuracy: The metric of the float model on `validation_data`.
        validation_data: Tuple `(x, y)` or dataset that `Model.evaluate` takes again and again.
            Not the test set: these data decide.
        metric: Name of the metric, higher is better.
        by: Fraction of the epochs at which the target has come down, 0 <= by < 1. Before
            `FreezeBits(at=...)`, so that bits and weights have time to settle. Not used with
            `max_accuracy_drop`, which takes at each epoch what the accuracy then permits.
        update_freq: Batches from one solution of the price to the next, at most an epoch;
            likewise.

    Raises:
        ValueError: Not exactly one target is given; it is no positive number; it is smaller than
            the model at its lowest bit-widths (on `fit`; the smallest feasible size is named);
            `max_accuracy_drop` comes without `float_accuracy` or `validation_data`; or the
            model's `bit_gradient` does not predict losses, or no kernel of it is trainable.

    Examples:
        >>> model = keras_learnbits.LearnedBitSequential(
        ...     [keras.Input((8,)), keras_learnbits.LearnedBitDense(4),
        ...      keras_learnbits.LearnedBitDense(2)])
        >>> model.compile("adam", "mse", bit_optimizer=keras_learnbits.SignSGD(0.1))
        >>> callbacks = [BitBudget(target_bits=3.2), keras_learnbits.FreezeBits(at=0.75)]
        >>> history = model.fit(np.ones((320, 8)), np.ones((320, 2)), epochs=8, verbose=0,
        ...                     callbacks=callbacks)
        >>> keras_learnbits.bit_table(model).mean_bits
        3.2
    """

    def __init__(
        self,
        target_bits=None,
        *,
        target_bytes=None,
        target_compression=None,
        max_accuracy_drop=None,
        float_accuracy=None,
        validation_data=None,
        metric="accuracy",
        by=0.5,
        update_freq=50,
    ):
        super().__init__()
        targets = {
            "target_bits": target_bits,
            "target_bytes": target_bytes,
            "target_compression": target_compression,
            "max_accuracy_drop": max_accuracy_drop,
        }
        given = {name: value for name, value in targets.items() if value is not None}
        least = 0 if max_accuracy_drop is not None else np.nextafter(0, 1)
        if len(given) != 1 or not all(least <= value < np.inf for value in given.values()):
            raise ValueError(
                f"`BitBudget` needs exactly one of {', '.join(targets)}, a positive number. "
                f"Received: {given}"
            )
        if max_accuracy_drop is not None and (float_accuracy is None or validation_data is None):
            raise ValueError(
                "`max_accuracy_drop` needs `float_accuracy` and `validation_data`, which must not "
                f"be the test set. Received: float_accuracy={float_accuracy}, "
                f"validation_data={validation_data}"
            )
        if not 0 <= by < 1:
            raise ValueError(f"`by` must be a fraction, 0 <= by < 1. Received: by={by}")
        if not isinstance(update_freq, int) or update_freq < 1:
            raise ValueError(
                "`update_freq` must be a positive number of batches. "
                f"Received: update_freq={update_freq!r}"
            )
        if max_accuracy_drop is None:
            kind, value = next(iter(given.items()))
            self.target = SIZES[kind](kind, value, by)
        else:
            self.target = _Accuracy(float_accuracy - max_accuracy_drop, validation_data, metric)
        self.update_freq = update_freq
        self._begun = False

    def on_train_begin(self, logs=None):
        if not hasattr(self.model, "freeze_bits"):
            raise TypeError(
                "`BitBudget` needs a LearnedBitModel or LearnedBitSequential; in other models "
                f"bits do not move. Received: model={self.model}"
            )
        self.found_frozen = self.model.bits_are_frozen
        self.model.unfreeze_bits()
        self.model.bit_budget = self
        self._begun, self._allocated = False, None
        self._epoch = self._step = self._epoch_start = 0
        self._steered_in = None
        self._begin()

    def _begin(self):
        """Once the model is built, which may be in its first step."""
        if not self._begun and quantized_kernels(self.model):
            self.target.begin(self.model)
            self._begun = True

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch, self._epoch_start = epoch, self._step
        if self._begun and not self.model.bits_are_frozen:
            self.target.begin_epoch(self.model)

    def on_train_batch_end(self, batch, logs=None):
        self._begin()
        # `batch` is the last of several under `steps_per_execution`.
        before, self._step = self._step, self._epoch_start + batch + 1
        if before == 0 or self._step // self.update_freq > before // self.update_freq:
            steps = self.params.get("steps") or np.inf
            self._steer(self._epoch + (batch + 1) / steps)

    def on_epoch_end(self, epoch, logs=None):
        if self._steered_in != epoch:
            self._steer(epoch + 1)

    def _steer(self, epochs):
        """Once so many epochs have passed, a real number."""
        self._steered_in = self._epoch
        if self._begun and not self.model.bits_are_frozen:
            self.target.steer(self.model, epochs / self.params["epochs"])

    def on_train_end(self, logs=None):
        # Callbacks that restore weights restore the bits that went with them.
        frozen = self.model.bits_are_frozen
        settled = frozen and self._allocated is not None
        if not self._step:  # no epoch was left
            settled = (frozen or self.found_frozen) and self.keep()
        if not settled:
            self.allocate()
        self.model.freeze_bits(self._allocated)
        self.model.bit_reg.assign(self.model.bit_settings["bit_reg"])
        self.model.bit_budget = None

    def keep(self):
        """Takes the widths in use for allocated, if the target permits them, and says whether."""
        self._begin()
        permitted = self.target.permits(self.model)
        if permitted:
            self._allocated = [int(each.integer_bits()) for each in self.model.quantized_tensors]
        return permitted

    def allocate(self):
        """The integer widths to freeze at, one for each quantized kernel, then each activation."""
        self._begin()
        tensors = self.model.quantized_tensors
        widths = dict(zip(map(id, tensors), self.model.cheapest_integers(), strict=True))
        for each in activations_among(tensors):  # an accuracy is to hold with these
            each.bits.assign(float(widths[id(each)]))
        kernels, choices = self.target.allocate(self.model)
        widths |= {id(k): int(choice) + 1 for k, choice in zip(kernels, choices, strict=True)}
        self._allocated = [widths[id(tensor)] for tensor in tensors]
        return self._allocated


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


class _Size:
    """A target for the size; a subclass says in what unit."""

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
        kernels, losses = _predicted_losses(model)
        self._limit = self.limit(model)
        self._table = self.sizes(
            np.array([kernel.size for kernel in kernels])[:, None],
            np.arange(ops.MIN_BITS, ops.MAX_BITS + 1),
        )
        self._start = None
        self._rest = self.total(model) - self._present(kernels)
        smallest = allocation.smallest_size(losses, self._table) + self._rest
        if smallest > self._limit:
            name = self.kind.removeprefix("target_")
            raise ValueError(
                f"`{self.kind}` must be within what the lowest bit-widths reach: "
                f"{self.as_target(model, smallest)} {name}. Received: {self.kind}={self.value}"
            )

    def begin_epoch(self, model):
        pass

    def permits(self, model):
        return self.total(model) <= self._limit

    def steer(self, model, progress):
        # From where this training begins, or goes on after an interruption.
        size, since = self._start = self._start or (self.total(model), progress)
        if not model.losses_are_known:
            return
        kernels, prices, choices = _descent(model)
        left = (self.by - progress) / (self.by - since) if progress < self.by else 0.0
        scheduled = self._limit + left * max(size - self._limit, 0)
        if not left and SLACK * self._limit <= self._present(kernels) + self._rest <= self._limit:
            return
        totals = self._sizes_of(choices).sum(axis=1) + self._rest
        within = np.flatnonzero(totals <= max(scheduled, totals[-1]))
        model.bit_reg.assign(_price_at(prices, within[0]))

    def allocate(self, model):
        kernels, losses = _predicted_losses(model)
        return kernels, allocation.allocate(losses, self._table, self._limit - self._rest)

    def _sizes_of(self, choices):
        return self._table[np.arange(len(self._table)), choices]

    def _present(self, kernels):
        return self._sizes_of([int(kernel.integer_bits()) - 1 for kernel in kernels]).sum()


class _Bits(_Size):
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


class _Bytes(_Size):
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


class _Accuracy:
    """A target for a metric on validation data."""

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

    def begin_epoch(self, model):
        if model.losses_are_known:
            _, prices, _, step = self._smallest_within(model)
            model.bit_reg.assign(_price_at(prices, step))

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
