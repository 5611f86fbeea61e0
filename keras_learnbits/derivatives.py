"""Estimators that take a derivative by the bits: `StraightThrough`, `Paper`; and their base."""

import math
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from keras_learnbits.serialization import register


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
    """

    predicts_losses = False
    kernels_only = False
    takes_bit_gradients = True

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

    def before_update(self, tensors):
        """Called between the estimate and the update of weights and bits."""

    def get_config(self):
        return {}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


class Derivative(BitGradient):
    """Base class of the estimators that take a derivative by the bits for a whole bit's change."""

    def task_gradients(self, step):
        """The derivatives without the price's, shape `(layers,)`."""
        raise NotImplementedError

    def __call__(self, step):
        return self.task_gradients(step) + step.price_gradients

    def predict(self, step):
        slopes = self.task_gradients(step)
        return tf.stack([-slopes, slopes], axis=1)


@register
class StraightThrough(Derivative):
    """The derivative of the whole loss by the bits, rounding passed straight through."""

    def task_gradients(self, step):
        return tf.stack(step.bit_gradients) / step.loss_unit - step.price_gradients


@register
class Paper(Derivative):
    """The published formulas: the bits see the quantization error and the price, not the task.

        dQ/dB = sum (W~ - W) * (-d) * Z

    with step `d` and integer codes `Z` held fixed. (`-d` for `dd/dB` is printed; the derivative
    of `d = range / 2**B` is `-ln(2) * d`. Only the sign matters.)

    Source: Raghavan et al., "BitNet: Bit-Regularized Deep Neural Networks", arXiv 1708.04788.
    """

    kernels_only = True
    takes_bit_gradients = False

    def task_gradients(self, step):
        slopes = [self.error_slope(kernel) for kernel in step.tensors]
        return step.quantization_reg * tf.stack(slopes)

    def before_update(self, tensors):
        for kernel in tensors:
            kernel.project()

    @staticmethod
    def error_slope(kernel):
        """`dQ/dB` of one kernel, a float32 scalar."""
        codes, grid = kernel.encode()
        codes = tf.cast(codes, tf.float32)
        residual = grid.step * (codes + grid.offset) - tf.cast(kernel.kernel.value, tf.float32)
        return -math.log(2.0) * tf.reduce_sum(residual * grid.step * codes)
