"""`BitGradient`, the base class of the estimators, and `BitStep`, their input."""

import dataclasses

import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class BitStep:
    """What an estimator may read in a training step.

    Losses are means over this replica's examples, without the price of the bits (`bit_reg` times
    the penalty of the bits).

    Attributes:
        tensors: List of the `QuantizedTensor`s whose bits are trained; `layers` is their number.
        kernel_gradients: Dictionary of tensor to the gradient of `loss_unit` times the loss with
            respect to its float kernel; None for an activation.
        bit_gradients: Dictionary of tensor to the gradient of `loss_unit` times the loss with
            respect to its bit-width, straight through the rounding; None if the estimator's
            `takes_bit_gradients` is False.
        loss_unit: Factor by which mixed precision and replicas have multiplied the loss.
        price_gradients: Derivatives of the price with respect to the bits, shape `(layers,)`.
        price_changes: Changes of the price with one bit fewer and with one more, shape
            `(layers, 2)`.
        error_term: `ErrorTerm`, the quantization error's share of the loss.
        losses: `CounterfactualLosses` of this batch.
        batch_size: Number of examples, a scalar tensor.
        bits_move: Boolean tensor, False while the bits are frozen.
    """

    tensors: list
    kernel_gradients: dict
    bit_gradients: dict | None
    loss_unit: tf.Tensor
    price_gradients: tf.Tensor
    price_changes: tf.Tensor
    error_term: object
    losses: object
    batch_size: tf.Tensor
    bits_move: tf.Tensor

    def for_tensors(self, tensors):
        """The same step for some of the tensors.

        Args:
            tensors: List of `QuantizedTensor`s, a subset of `tensors`.
        """
        indices = [self.tensors.index(tensor) for tensor in tensors]
        return dataclasses.replace(
            self,
            tensors=tensors,
            price_gradients=tf.gather(self.price_gradients, indices),
            price_changes=tf.gather(self.price_changes, indices),
        )

    def loss_changes(self, shifts):
        """Measures how the loss on this batch changes at other bit-widths.

        The model runs at these widths in the same way as in this step, with the same dropout.

        Args:
            shifts: Integers to add to the bit-widths of `tensors`, shape `(cases, layers)`.

        Returns:
            Float32 tensor of shape `(cases,)`.
        """
        return self.losses.changes(self.tensors, shifts)

    def error_weights(self):
        """Loss per squared quantization error of each tensor, shape `(layers,)`."""
        return self.error_term.weights(self.tensors)


class BitGradient:
    """Base class of the estimators: a function from a `BitStep` to a gradient for each bit-width.

    A subclass defines `__call__`. If it has state, it creates variables in `build` and returns the
    arguments of its constructor from `get_config`; register it with
    `keras.saving.register_keras_serializable` so that files can hold it. `probe_bits` also needs
    `predict`.

    Attributes:
        predicts_losses: Whether `loss_table` predicts the loss at all integer bit-widths, as
            `AdjacentWidths` does; `BitBudget` needs that.
        kernels_only: Whether it estimates gradients for kernels only, and not for activations.
        takes_bit_gradients: Whether it reads `BitStep.bit_gradients`, which are computed only
            then.
        trains_float_kernels: Whether training steps compute the task's loss with the float kernels
            instead of the quantized ones. `evaluate`, `predict` and exports always use the
            quantized ones.
        compile_defaults: Dictionary of arguments of `compile` to their default values.
        bit_learning_rate: Step size of the default optimizer of the bits, in bits.
    """

    predicts_losses = False
    kernels_only = False
    takes_bit_gradients = True
    trains_float_kernels = False
    compile_defaults = {
        "bit_reg": 1e-3,
        "quantization_reg": 1e-3,
        "bit_penalty": "bits",
        "quantization_error": "relative",
    }
    bit_learning_rate = 0.01

    def build(self, tensors, add_variable):
        """Creates the estimator's state.

        Args:
            tensors: List of all `QuantizedTensor`s that are trained.
            add_variable: Method `add_variable` of the optimizer that keeps the state.
        """

    def __call__(self, step):
        """Estimates the gradients of loss plus price with respect to the bit-widths.

        Gradients are averaged over replicas before the optimizer takes their sign.

        Args:
            step: `BitStep`.

        Returns:
            Float32 tensor of shape `(layers,)`.
        """
        raise NotImplementedError

    def predict(self, step):
        """Predicts the changes of the loss, without the price, at the adjacent bit-widths.

        Args:
            step: `BitStep`.

        Returns:
            Float32 tensor of shape `(layers, 2)`: with one bit fewer, and with one more.
        """
        raise NotImplementedError

    def get_config(self):
        return {}

    @classmethod
    def from_config(cls, config):
        return cls(**config)
