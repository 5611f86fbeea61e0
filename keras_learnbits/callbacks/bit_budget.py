"""`BitBudget`: a target for the size or the accuracy instead of a price."""

import numbers

import keras
import numpy as np

from keras_learnbits.allocation.accuracy_target import AccuracyTarget
from keras_learnbits.allocation.size_targets import SIZE_TARGETS
from keras_learnbits.allocation.targets import SizeTarget, Target
from keras_learnbits.arguments import check_number
from keras_learnbits.callbacks.measured_start import start_at_measured_widths
from keras_learnbits.layers.checks import check_finite_weights
from keras_learnbits.layers.discovery import activations_among, quantized_kernels
from keras_learnbits.training.fitting import check_learns_bits


class BitBudget(keras.callbacks.Callback):
    """Adjusts the price of the bits during training so that the model meets a target.

    While bits move, the target decreases gradually from the model's initial size, and `bit_reg` is
    set to the price at which the predicted losses lead to that size. The price is computed from
    scratch each time, so errors do not accumulate; after `fit` it is the compiled one again. When
    `FreezeBits` freezes the bits, or else at the end, integers are allocated exactly: those with
    the least predicted loss within the target, so that no layer could take one more bit.

    `val_loss` rises with the price: compare epochs by `EarlyStopping("val_task_loss", mode="min")`.

    Sizes are those of the weights, except bit operations; the bits of activations follow the price.
    At the start of each `fit` the bits are unfrozen. If a callback restores weights at the end of
    training, as `EarlyStopping` may, put the budget after it, because the budget restores the
    integers.

    Args:
        target_bits: Mean bits per weight, over all quantized kernels.
        target_bytes: Packed bytes of the whole model, as `bit_table` counts them: codes, scales,
            and float32 parameters.
        target_compression: Float32 bytes divided by packed bytes.
        target_bit_operations: Bit operations of one example, as `bit_table` counts them. Bits of
            weights and of activations are allocated together, from `start`, before the first
            step, and stay.
        target: Custom `keras_learnbits.callbacks.Target`, such as a subclass of `SizeTarget`.
        max_accuracy_drop: Difference by which the accuracy on `validation_data` may be lower than
            `float_accuracy` when the bits are frozen, e.g. 0.005. The model becomes as small as
            that permits.
        float_accuracy: Metric of the float model on `validation_data`.
        validation_data: Tuple `(x, y)` or dataset that `Model.evaluate` can read repeatedly. Do
            not use the test set, because the bit-widths are chosen by these data.
        metric: Name of the metric; higher values must be better.
        by: Fraction of the epochs after which the target is reached, 0 <= by < 1. Make it less
            than `FreezeBits(at=...)`, so that bits and weights have time to settle. Not used with
            `max_accuracy_drop`, which sets the price by the accuracy at the start of each epoch.
        update_freq: Number of batches between two updates of the price, at most an epoch. Not
            used with `max_accuracy_drop`.
        start: Example inputs, a few hundred, in the forms that `keras_learnbits.quantize` takes.
            If given, training begins at the target: before the first epoch bits are set to those
            that `quantize` would allocate, weights are trained near their final widths, and no
            width changes by more than one bit when bits are frozen, unless bits have moved so far
            that the target would not be used up. By default the size decreases from the model's
            initial one.

    Raises:
        ValueError: Not exactly one target is given; a target is not a positive number;
            `max_accuracy_drop` is given without `float_accuracy` or `validation_data`, or with
            `start`; `validation_data` cannot be read repeatedly; `target_bit_operations` is given
            without `start`. In `fit`: the target is below the size at the lowest bit-widths, which
            the message states; there are two budgets; a weight is not finite; lower values of
            `metric` are better; the model's `bit_gradient` does not predict losses; or no kernel is
            trainable.

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
        target_bit_operations=None,
        target=None,
        max_accuracy_drop=None,
        float_accuracy=None,
        validation_data=None,
        metric="accuracy",
        by=0.5,
        update_freq=50,
        start=None,
    ):
        super().__init__()
        given = {
            "target_bits": target_bits,
            "target_bytes": target_bytes,
            "target_compression": target_compression,
            "target_bit_operations": target_bit_operations,
            "target": target,
            "max_accuracy_drop": max_accuracy_drop,
        }
        _check_targets(given)
        if target is not None:
            self.target = target
        elif max_accuracy_drop is not None:
            self.target = _accuracy_target(
                max_accuracy_drop, float_accuracy, validation_data, metric
            )
        else:
            kind, value = next((k, v) for k, v in given.items() if v is not None)
            self.target = SIZE_TARGETS[kind](value)
        if start is not None and not isinstance(self.target, SizeTarget):
            raise ValueError(
                "`start` allocates bits within a size: give `target_bits`, `target_bytes` or "
                f"`target_compression`. Received: {[k for k, v in given.items() if v is not None]}"
            )
        if start is None and self.target.frozen_from_start:
            raise ValueError(
                f"`{self.target.name}` allocates bits from measurements before the first step: "
                "give `start`, a few hundred example inputs. Received: start=None"
            )
        check_number("by", by, 0, below=1)
        check_number("update_freq", update_freq, 1, integer=True)
        self.by = by
        self.update_freq = update_freq
        self.start = start
        self._begun = False

    def on_train_begin(self, logs=None):
        check_learns_bits(self.model, "BitBudget")
        self._plan = self.model.fit_plan
        if self._plan.budget is not None:
            raise ValueError(
                "A `fit` takes one `BitBudget`, because two would set the same price. "
                "Received: `callbacks` with two"
            )
        check_finite_weights(self.model, "`BitBudget`")
        self._plan.budget = self
        self._plan.unfreeze()
        self._begun, self._allocated = False, None
        self._epoch = self._step = self._epoch_start = 0
        self._steered_in = None
        self._begin()

    def _begin(self):
        """Begins once the model is built, which may happen in its first step."""
        if not self._begun and quantized_kernels(self.model):
            self.target.begin(self.model)
            self._begun = True

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch, self._epoch_start = epoch, self._step
        is_first = epoch == 0 and not self.target.frozen_from_start
        if is_first and self.start is not None and not self.model.bits_are_frozen:
            self._start_at_target()
        if self.target.frozen_from_start and not self.model.bits_are_frozen:
            self._freeze_at_target(resumed=epoch > 0)
        if self._begun and not self.model.bits_are_frozen:
            self.target.begin_epoch(self.model)

    def _start_at_target(self):
        if not self._begun:
            raise ValueError(
                "`BitBudget(start=...)` needs a built model: call it on data first, or give it an "
                f"Input. Received: model={self.model.name!r}"
            )
        start_at_measured_widths(self.model, self.target, self.start)
        self.target.begin_at_target()

    def _freeze_at_target(self, resumed):
        """Allocates bits from measurements and freezes them; a resumed training keeps its bits."""
        if not (resumed and self.keep()):
            self._start_at_target()
            self.keep()
        self.model.freeze_bits()

    def on_train_batch_end(self, batch, logs=None):
        self._begin()
        # With `steps_per_execution` Keras calls this once for several batches; `batch` is the last.
        before, self._step = self._step, self._epoch_start + batch + 1
        if before == 0 or self._step // self.update_freq > before // self.update_freq:
            steps = self.params.get("steps") or np.inf
            self._steer(self._epoch + (batch + 1) / steps)

    def on_epoch_end(self, epoch, logs=None):
        if self._steered_in != epoch:
            self._steer(epoch + 1)

    def _steer(self, epochs):
        """Sets the price.

        Args:
            epochs: Number of epochs that have passed, a real number.
        """
        self._steered_in = self._epoch
        if self._begun and not self.model.bits_are_frozen:
            self.target.steer(self.model, epochs / self.params["epochs"], self.by)

    def on_train_end(self, logs=None):
        # A callback before this one may have restored weights of an earlier epoch, and its bits.
        frozen = self.model.bits_are_frozen
        settled = frozen and self._allocated is not None
        if not self._step:  # there was no epoch left to train
            settled = (frozen or self._plan.found_frozen) and self.keep()
        if not settled:
            self.allocate()
        self.model.freeze_bits_untrained(self._allocated)

    def keep(self):
        """Takes the current bit-widths as the allocation if the target permits them.

        Returns:
            Whether the target permits them.
        """
        self._begin()
        permitted = self.target.permits(self.model)
        if permitted:
            tensors = self.model.quantized_tensors
            self._allocated = {tensor: int(tensor.integer_bits()) for tensor in tensors}
        return permitted

    def allocate(self):
        """The bit-widths to freeze: dictionary of `QuantizedTensor` to integer."""
        self._begin()
        if self.target.frozen_from_start:  # another callback freezes before the first step
            self._freeze_at_target(resumed=False)
            return self._allocated
        widths = self.model.cheapest_integers()
        # An accuracy target evaluates the model, which must have the final widths of activations.
        for tensor in activations_among(self.model.quantized_tensors):
            tensor.bits.assign(float(widths[tensor]))
        self._allocated = widths | self.target.allocate(self.model)
        return self._allocated


def _check_targets(targets):
    """Raises a ValueError unless exactly one target is given, of the right kind.

    Args:
        targets: Dictionary of arguments of `BitBudget` to their values.
    """
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) == 1:
        [(name, value)] = given.items()
        if isinstance(value, Target) if name == "target" else _is_size(value, name):
            return
    raise ValueError(
        f"`BitBudget` needs exactly one of {', '.join(targets)}: a positive number, or as "
        f"`target` an instance of `keras_learnbits.callbacks.Target`. Received: {given}"
    )


def _is_size(value, name):
    positive = 0 if name == "max_accuracy_drop" else np.nextafter(0, 1)
    return isinstance(value, numbers.Real) and positive <= value < np.inf


def _accuracy_target(max_accuracy_drop, float_accuracy, validation_data, metric):
    if float_accuracy is None or validation_data is None:
        raise ValueError(
            "`max_accuracy_drop` needs `float_accuracy` and `validation_data`, which must not "
            f"be the test set. Received: float_accuracy={float_accuracy}, "
            f"validation_data={validation_data}"
        )
    check_number("float_accuracy", float_accuracy)
    return AccuracyTarget(float_accuracy - max_accuracy_drop, validation_data, metric)
