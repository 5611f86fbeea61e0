"""`TrainingStep`: the loss and the training step of a model that learns its bits."""

import keras
import tensorflow as tf

from keras_learnbits._keras import with_metrics_built_first
from keras_learnbits.estimators.base import BitStep
from keras_learnbits.layers.checks import check_kernels
from keras_learnbits.layers.compute_scope import (
    computing_with_float_kernels,
    flowing_bit_gradients,
    wants_bit_gradients,
)
from keras_learnbits.layers.discovery import activations_among, kernels_among
from keras_learnbits.layers.rounding_scope import once, rounding_again, rounding_once
from keras_learnbits.training.bit_state import BitState
from keras_learnbits.training.counterfactual import (
    CounterfactualLosses,
    run,
    training_argument,
    values_before,
    without_side_effects,
)
from keras_learnbits.training.gradients import Gradients
from keras_learnbits.training.metrics import BitMetrics
from keras_learnbits.training.objective import ErrorTerm, mean_bits
from keras_learnbits.training.replicas import shared, unshared


class TrainingStep(BitState):
    """Computes the loss and trains weights and bits on a batch. Goes before the Keras model class.

    The loss that `fit` minimizes and `evaluate` reports is

        loss = task_loss + quantization_reg * quantization_error + bit_reg * bit_penalty

    and all these names appear in the logs, with `mean_bits`.
    """

    def _add_bit_metrics(self):
        """Creates the metrics; the Keras class must be initialized."""
        names = "task_loss quantization_error bit_penalty mean_bits mean_activation_bits bit_reg"
        self.bit_metrics = BitMetrics(names.split())

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """The loss of the weights: the task's loss plus the quantization error.

        The price of the bits does not depend on the weights. It is added to the loss that `fit` and
        `evaluate` report. A subclass with a custom loss adds it to `super().compute_loss(...)`,
        and then needs no loss in `compile`.
        """
        # keras/src/trainers/trainer.py, `compute_loss`, raises if there is nothing to minimize.
        if self.loss is None and not self.losses and self._computes_a_loss_itself():
            task_loss = tf.zeros(())
        else:
            task_loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        if task_loss.shape.rank != 0:
            raise ValueError(
                "A LearnedBitModel needs a loss that is one number per batch, as with "
                f"`reduction='sum_over_batch_size'`. Received: a loss of shape {task_loss.shape}"
            )
        check_kernels(self, kernels_among(self.quantized_tensors))
        return task_loss + tf.cast(shared(self._error_term()), task_loss.dtype)

    def _computes_a_loss_itself(self):
        return type(self).compute_loss is not TrainingStep.compute_loss

    def _error_and_penalty(self):
        """Quantization error and penalty, two float32 scalars; computed once in `rounding_once`."""
        tensors = self.quantized_tensors

        def computed():
            objective = self.bit_objective
            return objective.quantization_error(tensors), objective.penalty(tensors)

        return once("error and penalty", tuple(tensors), computed)

    def _error_term(self):
        """The term of the quantization error in the loss, a float32 scalar."""
        return self.quantization_reg.value * self._error_and_penalty()[0]

    def _price(self):
        """The term of the bits in the loss, a float32 scalar."""
        return self.bit_reg.value * self._error_and_penalty()[1]

    def loss_parts(self):
        """The parts of the loss that do not depend on data, a dictionary of name to scalar."""
        tensors = self.quantized_tensors
        activations = activations_among(tensors)
        error, penalty = self._error_and_penalty()
        parts = {
            "quantization_error": error,
            "mean_bits": mean_bits(kernels_among(tensors)),
            "bit_reg": tf.convert_to_tensor(self.bit_reg.value),
        }
        if activations:
            parts["mean_activation_bits"] = mean_bits(activations)
        if self.bit_settings["bit_penalty"] != "bits":  # the default is the sum of these means
            parts["bit_penalty"] = penalty
        return parts

    def _update_losses(self, loss, x, y):
        """Updates the metrics of the loss and of its parts from the result of `compute_loss`."""
        loss = tf.cast(unshared(loss), tf.float32)
        count = _batch_size(x, y)
        parts = {"task_loss": loss - self._error_term(), **self.loss_parts()}
        self.bit_metrics.update_state(parts, sample_weight=count)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss + self._price(), sample_weight=count)

    def _all_are_built(self):
        return all(layer.built for layer in (self, *self.layers))

    def make_train_function(self, force=False):
        # TensorFlow traces a `tf.function` twice if its first call creates variables, so they are
        # created here: https://www.tensorflow.org/guide/function#creating_tfvariables
        remade = force or self.train_function is None
        if self._all_are_built() and not self.optimizer.built:
            self.optimizer.build(self.trainable_variables)
        super().make_train_function(force)
        in_graphs = self._all_are_built() and not self.run_eagerly
        if remade and in_graphs and self._keeps_keras_metrics():
            self.train_function = with_metrics_built_first(self, self.train_function)
        return self.train_function

    def _keeps_keras_metrics(self):
        """Whether metrics are updated as Keras does it, which a subclass may override."""
        return (
            type(self).train_step is TrainingStep.train_step
            and type(self).compute_metrics is keras.Model.compute_metrics
        )

    def train_step(self, data):
        x, y, sample_weight = batch = keras.utils.unpack_x_y_sample_weight(data)
        if not self._all_are_built():  # the gradient tape can only watch bits that exist
            self(tf.nest.map_structure(lambda t: keras.KerasTensor(t.shape, t.dtype), x))
        if not self.optimizer.built:
            self.optimizer.build(self.trainable_variables)
        self._check_training_argument()
        estimator = self._learned_bit_optimizer().bit_gradient
        tensors, before = self.trained_tensors, values_before(self)
        with rounding_once(), flowing_bit_gradients(estimator.takes_bit_gradients):
            with computing_with_float_kernels(estimator.trains_float_kernels):
                y_pred, loss, gradients = self._differentiate(batch, tensors)
            if tensors:
                step = self._bit_step(batch, tensors, loss, gradients, before)
                for tensor, gradient in self._estimated_gradients(estimator, step):
                    gradients.replace(tensor.bits, gradient)
            self._update_losses(loss, x, y)
        # Loss scaling tries scales at which gradients overflow, and skips these steps.
        if not isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer):
            gradients.check(loss)
        self.optimizer.apply(gradients.values, gradients.variables)
        return self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def test_step(self, data):
        x, y, sample_weight = batch = keras.utils.unpack_x_y_sample_weight(data)
        with rounding_once(), flowing_bit_gradients(False):
            y_pred, loss = run(self, batch, training=False)
            self._update_losses(loss, x, y)
        return self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def losses_at(self, data, shifts, training):
        """Losses on a batch at shifted bit-widths, without the price of the bits.

        This does not change the model: neither weights, nor metrics, nor statistics.

        Args:
            data: Tuple `(x, y, sample_weight)`.
            shifts: Float32 tensor of shape `(cases, layers)`, integers to add to the bit-widths of
                `trained_tensors`, which are clipped to their bounds.
            training: Whether to run the model as `fit` does, with batch statistics and with the
                same dropout in all cases; otherwise as `evaluate` does.

        Returns:
            Float32 tensor of shape `(cases,)`.
        """
        return CounterfactualLosses(self, data, training).at(self.trained_tensors, shifts)

    def bit_step(self, data):
        """The `BitStep` that a training step on a batch would pass to an estimator.

        This does not change the model: neither weights, nor metrics, nor statistics.

        Args:
            data: Tuple `(x, y, sample_weight)`.

        Returns:
            `keras_learnbits.bit_gradients.BitStep`.
        """
        tensors = self.trained_tensors
        with without_side_effects(self), rounding_once(), flowing_bit_gradients(True):
            _, loss, gradients = self._differentiate(data, tensors)
        return self._bit_step(data, tensors, loss, gradients, values_before(self))

    def _check_training_argument(self):
        """Raises a ValueError if `call` of a model with quantized activations lacks `training`."""
        # Keras would call the layers without it, and the activations would never be calibrated.
        activations = [each.name() for each in activations_among(self.quantized_tensors)]
        if activations and not training_argument(self.call, True):
            raise ValueError(
                "A model with a `LearnedBitActivation` needs a `call` that takes `training`. "
                f"Received: model={self.name!r}, with activations {activations}"
            )

    def _differentiate(self, batch, tensors):
        """Predictions, loss, and the gradients of the scaled loss.

        Args:
            batch: Tuple `(x, y, sample_weight)`.
            tensors: The `QuantizedTensor`s whose bits are trained.
        """
        with tf.GradientTape() as tape:
            if wants_bit_gradients():
                tape.watch([tensor.bits.value for tensor in tensors])
            y_pred, loss = run(self, batch, training=True)
            scaled_loss = self.optimizer.scale_loss(loss)
        variables = self.trainable_variables
        # The backward pass: a `keras.RematScope` calls layers again here.
        with rounding_again():
            return y_pred, loss, Gradients(variables, tape.gradient(scaled_loss, variables))

    def _bit_step(self, batch, tensors, loss, gradients, before):
        """The `BitStep` of a batch.

        Args:
            batch: Tuple `(x, y, sample_weight)`.
            tensors: The `QuantizedTensor`s whose bits are trained.
            loss: Result of `compute_loss`.
            gradients: `Gradients` of the scaled loss.
            before: Result of `values_before` from before this step.
        """
        everything = self.quantized_tensors
        indices = [everything.index(tensor) for tensor in tensors]
        objective, price = self.bit_objective, self.bit_reg.value
        return BitStep(
            tensors=tensors,
            kernel_gradients={t: gradients.of(t.kernel) for t in kernels_among(tensors)},
            bit_gradients={t: gradients.of_or_zero(t.bits) for t in tensors}
            if wants_bit_gradients()
            else None,
            loss_unit=shared(tf.cast(self.optimizer.scale_loss(1.0), tf.float32)),
            price_gradients=price * tf.gather(objective.penalty_gradients(everything), indices),
            price_changes=price * tf.gather(objective.penalty_changes(everything), indices),
            error_term=ErrorTerm(objective, self.quantization_reg.value, everything),
            losses=CounterfactualLosses(self, batch, state=before, loss=loss),
            batch_size=_batch_size(*batch[:2]),
            bits_move=tf.equal(self.bits_frozen.value, 0.0),
        )

    def _estimated_gradients(self, estimator, step):
        """Pairs of each tensor and its scaled gradient with respect to the bits."""
        # 0 while bits are frozen, and before an activation has a range. Estimators return gradients
        # of the unscaled loss, and the optimizer divides all gradients by the loss scale.
        unit = self.optimizer.scale_loss(shared(1.0 - self.bits_frozen.value))
        moves = unit * tf.stack([tensor.may_move() for tensor in step.tensors])
        estimates = tf.unstack(moves * estimator(step), num=len(step.tensors))
        return zip(step.tensors, estimates, strict=True)


def _batch_size(x, y):
    return tf.shape(next(t for t in tf.nest.flatten((x, y)) if t is not None))[0]
