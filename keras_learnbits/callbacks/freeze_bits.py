"""`FreezeBits`: rounds the bit-widths to integers and freezes them."""

import keras

from keras_learnbits.arguments import check_number
from keras_learnbits.calibration.batch_norm import estimate_batch_norm
from keras_learnbits.training.fitting import check_learns_bits


class FreezeBits(keras.callbacks.Callback):
    """Rounds the bits to integers and freezes them; the weights are trained further.

    The integers are those that a `BitBudget` allocates. Without one, each layer takes the integer
    below or above its latent bits that has less predicted loss plus price; or the nearer one if the
    model's `bit_gradient` does not predict losses.

    At the start of each `fit` the bits are unfrozen. At its end they are frozen, also if it stops
    early; they stay unfrozen only if `at` is an integer not below the number of epochs, and all
    epochs were trained. Put `EarlyStopping` before this callback if it restores weights. A `fit`
    that resumes an interrupted training (`initial_epoch`, `BackupAndRestore`) after the time of the
    freeze keeps bits that were frozen, unless a `BitBudget` does not permit them. Without this
    callback, frozen bits stay frozen.

    Args:
        at: Time of the freeze: a fraction of the epochs (a float below 1), which leaves at least
            the last epoch frozen, or the number of epochs before it (an integer). With a fraction
            and a single epoch, bits are frozen when training is over.
        quantization_reg: Weight of the quantization error in the last epoch of this `fit`. From
            the freeze on it increases linearly from the compiled one. This damps weights that
            oscillate between two levels (arXiv 2203.11086). None keeps the weight constant.
        batch_norm_data: Dataset of batches of inputs, or of tuples `(inputs, ...)`, from which the
            moving statistics of batch normalization are estimated before the last validation, and
            again when training is over, because Keras may replace the weights then (by averages,
            or by those of the best epoch). None keeps the moving statistics of training.

    Raises:
        ValueError: `at` is not a number, negative, or a float >= 1; `quantization_reg` is negative
            or not finite.
        TypeError: The model in training is not a `LearnedBitModel` or `LearnedBitSequential`.

    Examples:
        >>> model = keras_learnbits.LearnedBitSequential(
        ...     [keras.Input((8,)), keras_learnbits.LearnedBitDense(1)])
        >>> model.compile("adam", "mse", bit_reg=1.0)
        >>> history = model.fit(np.ones((320, 8)), np.ones((320, 1)), epochs=4, verbose=0,
        ...                     callbacks=[FreezeBits(at=0.5)])
        >>> history.history["mean_bits"][2] == history.history["mean_bits"][3]
        True
    """

    def __init__(self, at=0.75, quantization_reg=None, batch_norm_data=None):
        super().__init__()
        is_number = isinstance(at, int | float) and not isinstance(at, bool)
        if not is_number or not at >= 0 or (isinstance(at, float) and at >= 1):
            raise ValueError(
                "`at` must be a fraction of the epochs, 0 <= at < 1, or an integer number of "
                f"epochs. Received: at={at!r}"
            )
        if quantization_reg is not None:
            check_number("quantization_reg", quantization_reg, 0)
        self.at = at
        self.quantization_reg = quantization_reg
        self.batch_norm_data = batch_norm_data

    def on_train_begin(self, logs=None):
        check_learns_bits(self.model, "FreezeBits")
        self._plan = self.model.fit_plan
        self._plan.unfreeze()
        self._begins = True

    def on_epoch_begin(self, epoch, logs=None):
        epochs = self.params["epochs"]
        start = self.start(epochs)
        if epoch >= start and self._begins and epoch > 0 and self._goes_on_frozen():
            self._keep_or_allocate()
        elif epoch >= start and not self.model.bits_are_frozen:
            self.model.freeze_bits(self._plan.allocate())
        self._begins = False
        if self.quantization_reg is not None:
            # The compiled weight and not the model's current one, which may have been restored from
            # the middle of the ramp of an interrupted training.
            first, last = self.model.bit_settings["quantization_reg"], self.quantization_reg
            passed = epoch + 1 - start if epoch >= start else 0.0
            share = min(1.0, passed / max(1.0, epochs - start))
            self.model.steer_price("quantization_reg", first + share * (last - first))
        self._is_last = epoch == epochs - 1

    def start(self, epochs):
        """Number of epochs before the freeze.

        Args:
            epochs: Number of all epochs.
        """
        if not isinstance(self.at, float):
            return self.at
        return min(self.at * epochs, max(epochs - 1, 1))

    def on_test_begin(self, logs=None):
        if self._is_last:
            self._estimate_statistics()

    def on_train_end(self, logs=None):
        # A callback before this one may have restored weights of an earlier epoch, and its bits,
        # which need not be integers.
        is_due = isinstance(self.at, float) or self.model.stop_training
        if self._begins and self._goes_on_frozen():  # there was no epoch left to train
            self._keep_or_allocate()
        elif is_due and not (self.model.bits_are_frozen and self._has_integers()):
            self.model.freeze_bits_untrained(self._plan.allocate())
        # Since the last validation Keras may have replaced the weights by averages (with `use_ema`)
        # or by those of the best epoch.
        self._estimate_statistics()

    def _estimate_statistics(self):
        if self.batch_norm_data is not None:
            estimate_batch_norm(self.model.bit_learner(), self.batch_norm_data)

    def _has_integers(self):
        return all(float(t.latent_bits()).is_integer() for t in self.model.quantized_tensors)

    def _goes_on_frozen(self):
        """Whether this `fit` resumes a training whose bits were frozen.

        They were frozen when it began, or `BackupAndRestore` has restored frozen bits.
        """
        found_frozen = self._plan.found_frozen or self.model.bits_are_frozen
        return self._has_integers() and found_frozen

    def _keep_or_allocate(self):
        """Keeps the bits at which weights were trained, unless a budget does not permit them."""
        kept = self._plan.permits_present_widths()
        self.model.freeze_bits(None if kept else self._plan.allocate())
