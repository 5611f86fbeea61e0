"""`BitCompiling`: `compile` with settings for the bits, and access to these settings."""

import keras
import tensorflow as tf

from keras_learnbits import bit_gradients
from keras_learnbits.layers.checks import check_holders, check_kernels
from keras_learnbits.layers.discovery import quantized_kernels
from keras_learnbits.training.bit_variables import BitVariables
from keras_learnbits.training.objective import BitObjective, bit_settings
from keras_learnbits.training.optimizer import with_bits


class BitCompiling(BitVariables):
    """Configures how the bits are learned. Goes before the Keras model class.

    Attributes:
        bit_reg: Price of the bits, a scalar `keras.Variable` that callbacks may change.
        quantization_reg: Weight of the quantization error in the loss, a scalar `keras.Variable`.
        bits_frozen: 1.0 while the bits are frozen, else 0.0; a scalar `keras.Variable`.
        bit_settings: Dictionary of the arguments of `compile` that concern bits.
        bit_objective: `BitObjective`, the two terms that are added to the task's loss.

    The first three are state of the training and are saved with the optimizer. `compile` sets the
    prices, and leaves frozen bits frozen.
    """

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

        Frozen bits stay frozen until `unfreeze_bits`, or a `fit` with `FreezeBits` or `BitBudget`.
        The optimizer keeps the freeze: for a model loaded with `compile=False` call `freeze_bits`.

        Args:
            optimizer: As in `keras.Model.compile`; it updates the weights only.
            bit_reg: Price of the bits: with the default penalty, the increase of the loss that
                saving one mean bit per weight may cost. A number >= 0, 1e-3 by default; 1e-6 with
                `"paper"`.
            quantization_reg: Weight of the quantization error in the loss. A number >= 0, 1e-3 by
                default.
            bit_penalty: `"bits"`, the mean bits per weight; or the published `"levels"`,
                `sum 2**b`, the default with `"paper"`, or `"widths"`, `sum b`; or a function
                like `keras_learnbits.training.penalties.mean_bits`.
            quantization_error: `"relative"`, `||q - W||^2 / ||W||^2` averaged over the weights,
                or `"squared"`, the published `sum 1/2 ||q - W||^2`, the default with `"paper"`;
                or a function like `keras_learnbits.training.penalties.relative_error`.
            bit_gradient: Estimator of the gradients whose signs move the bits: `"measured"`,
                `"difference"`, `"straight_through"` or `"paper"`, or an instance of
                `keras_learnbits.bit_gradients.BitGradient`. With `"paper"` the task's loss in
                training is that of the float kernels.
            bit_optimizer: `keras.optimizers.Optimizer` for the bits; `SignSGD(0.01)` by default,
                which moves each bit-width by 0.01 bits per step, and `SignSGD(1.0)` with `"paper"`.
                It must not move bits whose gradient is 0, because that of frozen bits is 0.
            **kwargs: Other arguments of `keras.Model.compile`, which describes them.

        Raises:
            ValueError: A price is negative or not finite, a name is unknown, a learned-bit layer
                is inside a `SpectralNormalization`, or the model is built and has none.
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
        frozen = self._has_frozen_bits()
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
        if not config:
            return config
        functions = {
            name: keras.saving.serialize_keras_object(value)
            for name, value in self.bit_settings.items()
            if callable(value)
        }
        # Keras serializes its own arguments only.
        return {**config, **self.bit_settings, **functions}

    def compile_from_config(self, config):
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built:
            self.optimizer.build(self.trainable_variables)

    def _learned_bit_optimizer(self):
        """The `LearnedBitOptimizer`, which keeps the state of the bits' training."""
        if not self.compiled:
            raise AttributeError("You must compile the model before accessing its bits' state.")
        # Under mixed_float16 Keras wraps the optimizer: keras/src/trainers/trainer.py, `compile`.
        return getattr(self.optimizer, "inner_optimizer", self.optimizer)

    @property
    def bit_reg(self):
        return self._learned_bit_optimizer().bit_reg

    @property
    def quantization_reg(self):
        return self._learned_bit_optimizer().quantization_reg

    @property
    def bits_frozen(self):
        return self._learned_bit_optimizer().bits_frozen

    def _has_frozen_bits(self):
        """Whether the bits are frozen already when the model is compiled."""
        return self.compiled and self.bits_are_frozen

    @property
    def bits_are_frozen(self):
        """Whether the bits are frozen."""
        # Outside of the scope of a `tf.distribute` strategy `value` is a mirrored variable, which
        # has no truth value.
        return bool(tf.convert_to_tensor(self.bits_frozen.value))
