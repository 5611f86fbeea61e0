"""`LearnedBitTraining`: `fit`, `evaluate` and `save` of a model that learns its bits."""

import contextlib

import keras

from keras_learnbits.layers.compute_scope import flowing_bit_gradients
from keras_learnbits.layers.rounding_scope import rounding_once
from keras_learnbits.training.fit_plan import FitPlan
from keras_learnbits.training.step import TrainingStep


class LearnedBitTraining(TrainingStep):
    """Makes a Keras model learn its bits. Goes before the Keras model class.

    Its base classes list the bits among the trainable variables (`BitVariables`), configure
    training (`BitCompiling`), set prices and freeze bits (`BitState`), and train on a batch
    (`TrainingStep`).
    """

    fit_plan = None  # a `FitPlan` within `fit`

    def fit(self, *args, **kwargs):
        """Trains the model, like `keras.Model.fit`.

        If it raises or is interrupted, prices and the freeze are restored, because Keras does not
        call `on_train_end` of callbacks then. Weights and bits keep their trained values.
        """
        frozen = self.compiled and self.bits_are_frozen
        self.fit_plan = FitPlan(self)
        try:
            return super().fit(*args, **kwargs)
        except BaseException:
            if self.compiled:
                with self.distribute_strategy.scope():
                    self.bits_frozen.assign(float(frozen))
            raise
        finally:
            if self.compiled:
                with self.distribute_strategy.scope():
                    self.release_prices()
            self.fit_plan = None

    def evaluate(
        self,
        x=None,
        y=None,
        batch_size=None,
        verbose="auto",
        sample_weight=None,
        steps=None,
        callbacks=None,
        return_dict=False,
        **kwargs,
    ):
        """The loss and the compiled metrics, like `keras.Model.evaluate`.

        With `return_dict=True` it also returns the parts of the loss. The validation logs of `fit`
        do not contain the parts that do not depend on data, which are in the training logs.
        """
        with self.bit_metrics.only("task_loss"):
            logs = super().evaluate(
                x, y, batch_size, verbose, sample_weight, steps, callbacks, True, **kwargs
            )
        return self._as_keras(logs, return_dict)

    def test_on_batch(self, x, y=None, sample_weight=None, return_dict=False):
        """Like `keras.Model.test_on_batch`; the result has the form of that of `evaluate`."""
        with self.bit_metrics.only("task_loss"):
            logs = super().test_on_batch(x, y, sample_weight, return_dict=True)
        return self._as_keras(logs, return_dict)

    def train_on_batch(self, x, y=None, sample_weight=None, class_weight=None, return_dict=False):
        """Like `keras.Model.train_on_batch`; the result has the form of that of `evaluate`."""
        logs = super().train_on_batch(x, y, sample_weight, class_weight, return_dict=True)
        return self._as_keras(logs, return_dict)

    # A callback may save within a `fit` that steers prices. The file must have the user's prices,
    # as if the model were saved after `fit`.

    def save(self, *args, **kwargs):
        """Like `keras.Model.save`; the file has the prices from before `fit`."""
        with self._released_prices():
            return super().save(*args, **kwargs)

    def save_weights(self, *args, **kwargs):
        """Like `keras.Model.save_weights`; the file has the prices from before `fit`."""
        with self._released_prices():
            return super().save_weights(*args, **kwargs)

    def _released_prices(self):
        if not self.compiled:
            return contextlib.nullcontext()
        return self._learned_bit_optimizer().released()

    def _as_keras(self, logs, return_dict):
        """The result in Keras's form; a dictionary also has the parts of the loss."""
        if return_dict:
            return logs if self.fit_plan else {**logs, **self._parts_without_data()}
        names = []
        for metric in self.metrics:
            result = metric.result()
            names += result if isinstance(result, dict) else [metric.name]
        values = [
            logs[name] for name in names if name in logs and name not in self.bit_metrics.names
        ]
        return values[0] if len(values) == 1 else values

    def _parts_without_data(self):
        """The parts of the loss that do not depend on data: dictionary of name to number."""
        with rounding_once(), flowing_bit_gradients(False):
            parts = self.loss_parts()
        return {name: float(keras.ops.convert_to_numpy(value)) for name, value in parts.items()}


def check_learns_bits(model, name):
    """Raises a TypeError unless a model learns its bits in training.

    Args:
        model: Any object.
        name: Name of the function or class that needs such a model.
    """
    if not isinstance(model, LearnedBitTraining):
        raise TypeError(
            f"`{name}` needs a LearnedBitModel or LearnedBitSequential, because other models do "
            f"not train bits. Received: model={model}"
        )
