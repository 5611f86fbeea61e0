"""`BitGradient`, the base class of the estimators, and `BitStep`, their input."""

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf


class BitStep(NamedTuple):
    """What a training step knows when the bits are to move.

    Losses are means over this replica's examples; `layers` counts the quantized tensors.

    Attributes:
        tensors: The `QuantizedTensor`s whose bits are trained.
        kernel_gradients: Of `loss_unit` times the loss by each float kernel; None for
            an activation.
        bit_gradients: Of `loss_unit` times the loss by each bit-width, straight through the
            rounding; None where not asked for.
        loss_unit: What mixed precision and replicas have multiplied the loss by.
        price_gradients: Derivatives of `bit_reg * bit_penalty` alone, shape `(layers,)`.
        price_changes: What it changes with one bit fewer and with one more, shape `(layers, 2)`.
        quantization_reg: Weight of the quantization error in the loss, a scalar tensor.
        error_weights: Function to the loss per squared error that this weight comes to, shape
            `(layers,)`.
        loss_changes: Function of integer shifts of all bit-widths, shape `(cases, layers)`, to
            the changes of the loss on this batch, price left out, shape `(cases,)`: measured by
            running the model at these widths as this step ran it, with the same dropout; see
            `Measured`.
        batch_size: Number of examples, a scalar tensor.
        bits_move: Whether the bits are not frozen, a boolean tensor.
    """

    tensors: list
    kernel_gradients: list
    bit_gradients: list | None
    loss_unit: tf.Tensor
    price_gradients: tf.Tensor
    price_changes: tf.Tensor
    quantization_reg: tf.Tensor
    error_weights: Callable
    loss_changes: Callable
    batch_size: tf.Tensor
    bits_move: tf.Tensor

    def of_layers(self, places):
        """The same step for some of the layers.

        Args:
            places: Their places among `tensors`, a list of integers.
        """

        def pick(items):
            return [items[place] for place in places]

        among_all = tf.one_hot(places, len(self.tensors))
        return self._replace(
            tensors=pick(self.tensors),
            kernel_gradients=pick(self.kernel_gradients),
            bit_gradients=self.bit_gradients and pick(self.bit_gradients),
            price_gradients=tf.gather(self.price_gradients, places),
            price_changes=tf.gather(self.price_changes, places),
            error_weights=lambda: tf.gather(self.error_weights(), places),
            loss_changes=lambda shifts: self.loss_changes(tf.matmul(shifts, among_all)),
        )


class BitGradient:
    """Base class of the estimators: a function from a `BitStep` to a gradient for each
    quantized tensor.

    The gradients, shape `(layers,)`, are those of the mean loss of this replica's examples; they
    are averaged over replicas before the sign is taken.

    Attributes:
        predicts_losses: Whether it predicts the loss at whole bits, as `WholeBit` does.
        kernels_only: Whether it can say nothing of activations.
        takes_bit_gradients: Whether it reads `BitStep.bit_gradients`, which are computed only
            then.
        trains_float_kernels: Whether training steps take the task's loss at the float kernels;
            by default at the quantized ones. `evaluate`, `predict` and exports always use the
            quantized ones.
        compile_defaults: Dictionary of arguments of `compile` to the values that they have where
            a user leaves them out.
        bit_learning_rate: Step of the default optimizer of the bits, in bits.
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
        """Creates the estimator's state with an optimizer's `add_variable`."""

    def __call__(self, step):
        raise NotImplementedError

    def predict(self, step):
        """Predicted changes of the loss, price left out, with one bit fewer and with one more.

        Args:
            step: `BitStep`.

        Returns:
            Float32 tensor of shape `(layers, 2)`.
        """
        raise NotImplementedError

    def get_config(self):
        return {}

    @classmethod
    def from_config(cls, config):
        return cls(**config)
