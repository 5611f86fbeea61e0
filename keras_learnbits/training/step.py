"""`LearnedBitTraining`: a training step that learns the bits, too."""

import keras
import tensorflow as tf

from keras_learnbits import bit_gradients
from keras_learnbits.layers.checks import check_holders, check_kernels
from keras_learnbits.layers.compute_scope import computing_with_float_kernels
from keras_learnbits.layers.discovery import (
    activations_among,
    kernels_among,
    quantized_kernels,
    without_fixed_scales,
)
from keras_learnbits.layers.float_weights import TakesFloatWeights
from keras_learnbits.layers.rounding_scope import once, rounding_anew, rounding_once
from keras_learnbits.training.bit_state import BitControl
from keras_learnbits.training.counterfactual import (
    CounterfactualLosses,
    training_argument,
)
from keras_learnbits.training.fitting import Running
from keras_learnbits.training.metrics import BitMetrics, with_metrics
from keras_learnbits.training.objective import BitObjective, bit_settings, mean_bits
from keras_learnbits.training.optimizer import with_bits
from keras_learnbits.training.replicas import shared, unshared


class LearnedBitTraining(Running, BitControl, CounterfactualLosses, TakesFloatWeights):
    """What makes a Keras model learn bits; goes before the Keras class.

    The loss that `fit` minimizes and `evaluate` reports is

        loss = task_loss + quantization_reg * quantization_error + bit_reg * bit_penalty

    and all these names appear in the logs, with `mean_bits`.
    """

    def _add_bit_metrics(self):
        """Creates the metrics, once the Keras class is initialized."""
        names = "task_loss quantization_error bit_penalty mean_bits mean_activation_bits bit_reg"
        self.bit_metrics = BitMetrics(names.split())

    def compile(
        self,
        optimizer="rmsprop",
        loss=None,
        loss_weights=None,
        metrics=None,
        weighted_metrics=None,
        *,
        bit_reg=None,
        quantization_reg=None,
        bit_penalty=None,
        quantization_error=None,
        bit_gradient="measured",
        bit_optimizer=None,
        **kwargs,
    ):
        """Configures training: Keras's arguments, and how bits are learned.

        Frozen bits stay so until `unfreeze_bits`, or a `fit` with `FreezeBits` or `BitBudget`.

        Args:
            optimizer: As in `keras.Model.compile`; it acts on the weights only.
            bit_reg: Price of the bits: with the default penalty, what one mean bit per weight
                may cost in loss. A number >= 0, 1e-3 by default; 1e-6 with `"paper"`.
            quantization_reg: Weight of the quantization error in the loss. A number >= 0, 1e-3 by
                default.
            bit_penalty: `"bits"`, the mean bits per weight; or the published `"levels"`,
                `sum 2**b`, the default with `"paper"`, or `"widths"`, `sum b`.
            quantization_error: `"relative"`, `||q - W||^2 / ||W||^2` averaged over the weights,
                or `"squared"`, the published `sum 1/2 ||q - W||^2`, which is the default with
                `"paper"`.
            bit_gradient: What the sign is taken of: `"measured"`, `"difference"`,
                `"straight_through"` or `"paper"`, or an instance of
                `keras_learnbits.bit_gradients.BitGradient`. With `"paper"` training takes the
                task's loss at the float kernels.
            bit_optimizer: `keras.optimizers.Optimizer` for the bits; `SignSGD(0.01)` by default,
                which moves each bit-width by 0.01 bits a step, and `SignSGD(1.0)` with `"paper"`.
                Where its gradient is 0, as it is while bits are frozen, it must not move them.
            **kwargs: As in `keras.Model.compile`, as are arguments not described here.

        Raises:
            ValueError: A price is negative or not finite, a name is unknown, a learned-bit layer
                lies in a `SpectralNormalization`, or the model is built and has none.
        """
        bit_gradient = bit_gradients.get(bit_gradient)
        settings = bit_settings(
            bit_gradient.compile_defaults,
            bit_reg=bit_reg,
            quantization_reg=quantization_reg,
            bit_penalty=bit_penalty,
            quantization_error=quantization_error,
        )
        self.bit_objective = BitObjective(settings["bit_penalty"], settings["quantization_error"])
        check_holders(self)
        if self.built and self.layers:
            check_kernels(self, quantized_kernels(self))
        frozen = self.compiled and self.bits_are_frozen
        super().compile(
            optimizer=with_bits(optimizer, bit_optimizer, bit_gradient),
            loss=loss,
            loss_weights=loss_weights,
            metrics=metrics,
            weighted_metrics=weighted_metrics,
            **kwargs,
        )
        self.bit_reg.assign(settings["bit_reg"])
        self.quantization_reg.assign(settings["quantization_reg"])
        self.bits_frozen.assign(float(frozen))
        bit_gradient = keras.saving.serialize_keras_object(bit_gradient)
        self.bit_settings = {**settings, "bit_gradient": bit_gradient}

    def get_compile_config(self):
        config = super().get_compile_config()
        return {**config, **self.bit_settings} if config else config

    def compile_from_config(self, config):
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built:
            self.optimizer.build(self.trainable_variables)

    # The layers list their bits as non-trainable, so that other models leave them alone; here
    # they are trained.

    def _moving_bits(self):
        return [tensor.bits for tensor in self.trained_tensors]

    def _without_moving_bits(self, variables):
        moving = {id(bits) for bits in self._moving_bits()}
        return [variable for variable in variables if id(variable) not in moving]

    @property
    def trainable_variables(self):
        return without_fixed_scales(super().trainable_variables) + self._moving_bits()

    @property
    def trainable_weights(self):
        return without_fixed_scales(super().trainable_weights) + self._moving_bits()

    @property
    def non_trainable_variables(self):
        return self._without_moving_bits(super().non_trainable_variables)

    @property
    def non_trainable_weights(self):
        return self._without_moving_bits(super().non_trainable_weights)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """The task's loss plus the quantization error: what the weights are trained by.

        The price of the bits, which only the bits depend on, is added to the loss that `fit` and
        `evaluate` report. A subclass with a custom loss adds it to `super().compute_loss(...)`,
        which then needs no loss in `compile`.
        """
        if self.loss is None and not self.losses and self._computes_a_loss_itself():
            task_loss = tf.zeros(())
        else:
            task_loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        if task_loss.shape.rank != 0:
            raise ValueError(
                "A LearnedBitModel needs a loss that is one number a batch, as with "
                f"`reduction='sum_over_batch_size'`. Received: a loss of shape {task_loss.shape}"
            )
        check_kernels(self, kernels_among(self.quantized_tensors))
        return task_loss + tf.cast(shared(self._error_term()), task_loss.dtype)

    def _computes_a_loss_itself(self):
        return type(self).compute_loss is not LearnedBitTraining.compute_loss

    def _error_and_penalty(self):
        """Quantization error and penalty, two float32 scalars; once within `rounding_once`."""
        tensors = self.quantized_tensors

        def computed():
            objective = self.bit_objective
            return objective.quantization_error(tensors), objective.penalty(tensors)

        return once("error and penalty", tuple(tensors), computed)

    def _error_term(self):
        """What the quantization error adds to the loss, a float32 scalar."""
        return self.quantization_reg.value * self._error_and_penalty()[0]

    def _price(self):
        """What the bits add to the loss, a float32 scalar."""
        return self.bit_reg.value * self._error_and_penalty()[1]

    def loss_parts(self):
        """The parts of the loss that data do not change: dictionary of name to scalar tensor."""
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
        if self.bit_settings["bit_penalty"] != "bits":  # which is the sum of these means
            parts["bit_penalty"] = penalty
        return parts

    def _update_losses(self, loss, x, y):
        """Updates the metrics of the loss and of its parts, from what `compute_loss` returned."""
        loss = tf.cast(unshared(loss), tf.float32)
        count = _batch_size(x, y)
        parts = {"task_loss": loss - self._error_term(), **self.loss_parts()}
        self.bit_metrics.update_state(parts, sample_weight=count)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss + self._price(), sample_weight=count)

    def _has_its_variables(self):
        return all(layer.built for layer in (self, *self.layers))

    def make_train_function(self, force=False):
        # A step that creates variables is traced twice: have them created before the first one.
        remake = force or self.train_function is None
        if self._has_its_variables() and not self.optimizer.built:
            self.optimizer.build(self.trainable_variables)
        super().make_train_function(force)
        if remake and self._has_its_variables() and not self.run_eagerly and self._is_as_keras():
            self.train_function = with_metrics(self, self.train_function)
        return self.train_function

    def _is_as_keras(self):
        """Whether the metrics see the data as they are: no subclass has changed that."""
        return (
            type(self).train_step is LearnedBitTraining.train_step
            and type(self).compute_metrics is keras.Model.compute_metrics
        )

    def train_step(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if not self._has_its_variables():  # bits to watch must exist
            self(tf.nest.map_structure(lambda t: keras.KerasTensor(t.shape, t.dtype), x))
        moving = self.trained_tensors
        if not self.optimizer.built:
            self.optimizer.build(self.trainable_variables)
        bit_gradient = self._bit_state().bit_gradient
        self._check_training_argument()
        data = x, y, sample_weight
        by_bits = bit_gradient.takes_bit_gradients
        state = self._state_before()
        with rounding_once(by_bits):
            with computing_with_float_kernels(bit_gradient.trains_float_kernels):
                loss, y_pred, gradients, index = self._differentiate(data, moving, by_bits)
            if moving:
                step = self._bit_step(data, moving, (loss, gradients, index), by_bits, state)
                unit = self.optimizer.scale_loss(shared(1.0 - self.bits_frozen.value))
                moves = unit * tf.stack([tensor.may_move() for tensor in moving])
                estimates = tf.unstack(moves * bit_gradient(step), num=len(moving))
                for tensor, gradient in zip(moving, estimates, strict=True):
                    gradients[index[id(tensor.bits)]] = gradient
            self._update_losses(loss, x, y)
        gradients = self._checked(gradients, loss)
        self.optimizer.apply(gradients, self.trainable_variables)
        return self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def test_step(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        with rounding_once():
            y_pred, loss = self._call_and_compare(x, y, sample_weight, training=False)
            self._update_losses(loss, x, y)
        return self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def _differentiate(self, data, moving, by_bits):
        """Loss, predictions, the scaled loss's gradients, and each variable's place in them.

        Args:
            data: Tuple `(x, y, sample_weight)`.
            moving: The `QuantizedTensor`s whose bits are trained.
            by_bits: Whether gradients by their bits are wanted; they are None otherwise.
        """
        x, y, sample_weight = data
        with tf.GradientTape() as tape:
            tape.watch([tensor.bits.value for tensor in moving if by_bits])
            y_pred, loss = self._call_and_compare(x, y, sample_weight, training=True)
            scaled_loss = self.optimizer.scale_loss(loss)
        variables = self.trainable_variables
        with rounding_anew():
            gradients = tape.gradient(scaled_loss, variables)
        return loss, y_pred, list(gradients), {id(v): i for i, v in enumerate(variables)}

    def bit_step(self, data):
        """What a training step on a batch would show the estimators of bit gradients.

        Nothing changes: neither weights, nor metrics, nor statistics.

        Args:
            data: Tuple `(x, y, sample_weight)`.

        Returns:
            `keras_learnbits.bit_gradients.BitStep`.
        """
        moving = self.trained_tensors
        with self._changing_nothing(), rounding_once(by_bits=True):
            loss, _, gradients, index = self._differentiate(data, moving, by_bits=True)
        return self._bit_step(data, moving, (loss, gradients, index), True, self._state_before())

    def _check_training_argument(self):
        """Without it, no `LearnedBitActivation` would see that this is training."""
        activations = [each.name() for each in activations_among(self.quantized_tensors)]
        if activations and not training_argument(self.call, True):
            raise ValueError(
                "A model with a `LearnedBitActivation` needs a `call` that takes `training`. "
                f"Received: model={self.name!r}, with activations {activations}"
            )

    def _checked(self, gradients, loss):
        """The gradients, once they and the loss are known to be finite; else stops training.

        A loss may be finite where a gradient is not: a ReLU takes NaN to 0 on the way forth. Under
        `jit_compile=True` there is no check, since XLA leaves checks out.
        """
        if isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer):
            return gradients  # it skips such steps itself
        present = [
            tf.convert_to_tensor(getattr(g, "values", g)) for g in gradients if g is not None
        ]
        norm = tf.add_n([tf.cast(tf.nn.l2_loss(gradient), tf.float32) for gradient in present])
        found = tf.stack([tf.cast(loss, tf.float32), norm])
        message = (
            "LearnedBitModel stops before this step changes a trained weight, since its loss or "
            "the norm of its gradients is not finite. Look for NaN in the data, or lower the "
            "learning rate. Received: loss and squared norm"
        )
        with tf.control_dependencies([tf.debugging.check_numerics(found, message)]):
            return [
                g if g is None else tf.nest.map_structure(tf.identity, g, expand_composites=True)
                for g in gradients
            ]

    def _bit_step(self, data, moving, differentiated, by_bits, state):
        """What an estimator of bit gradients may look at.

        Args:
            data: Tuple `(x, y, sample_weight)` of this step.
            moving: The `QuantizedTensor`s whose bits are trained.
            differentiated: The loss, the scaled loss's gradients by the trainable variables, and
                a dictionary of a variable's `id` to its place in these.
            by_bits: Whether they have those by the bits.
            state: The `_state_before` that this step began with.

        Returns:
            `BitStep`.
        """
        loss, gradients, index = differentiated
        tensors = self.quantized_tensors
        places = [tensors.index(tensor) for tensor in moving]
        price = self.bit_reg.value
        kernels = [getattr(tensor, "kernel", None) for tensor in moving]
        return bit_gradients.BitStep(
            tensors=moving,
            kernel_gradients=[k if k is None else gradients[index[id(k)]] for k in kernels],
            bit_gradients=[_or_zero(gradients[index[id(t.bits)]]) for t in moving]
            if by_bits
            else None,
            loss_unit=shared(tf.cast(self.optimizer.scale_loss(1.0), tf.float32)),
            price_gradients=price
            * tf.gather(self.bit_objective.penalty_gradients(tensors), places),
            price_changes=price * tf.gather(self.bit_objective.penalty_changes(tensors), places),
            quantization_reg=tf.convert_to_tensor(self.quantization_reg.value),
            error_weights=lambda: (
                self.quantization_reg.value
                * tf.gather(self.bit_objective.error_weights(tensors), places)
            ),
            loss_changes=lambda shifts: self._loss_changes(data, shifts, loss, state),
            batch_size=_batch_size(*data[:2]),
            bits_move=tf.equal(self.bits_frozen.value, 0.0),
        )


def _batch_size(x, y):
    return tf.shape(next(t for t in tf.nest.flatten((x, y)) if t is not None))[0]


def _or_zero(gradient):
    """A gradient; 0 where the loss does not depend on the bits, as of an unused activation."""
    return tf.zeros(()) if gradient is None else gradient
