"""What the sign is taken of: estimators of the gradient of the loss by each bit-width."""

import math
from typing import NamedTuple

import tensorflow as tf

from keras_learnbits.serialization import register


class BitStep(NamedTuple):
    """What a training step knows when the bits are to move.

    Attributes:
        kernels: The `QuantizedKernel`s that are trained.
        kernel_gradients: Of `loss_scale * loss` by each float kernel.
        bit_gradients: Of `loss_scale * loss` by each bit-width, straight through the rounding.
        price_gradients: Of `bit_reg * bit_penalty` alone, exact.
        quantization_reg: Weight of the quantization error in the loss, a scalar tensor.
        loss_scale: Factor of the loss in mixed precision, else 1.
    """

    kernels: list
    kernel_gradients: list
    bit_gradients: list
    price_gradients: list
    quantization_reg: tf.Tensor
    loss_scale: float | tf.Tensor


class BitGradient:
    """Base class of the estimators: a function from a `BitStep` to one gradient a kernel.

    Each replica returns its share: the gradients are summed over replicas before the sign.
    """

    def __call__(self, step):
        raise NotImplementedError

    def before_update(self, kernels):
        """Called between the estimate and the update of weights and bits."""

    def get_config(self):
        return {}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


@register
class StraightThrough(BitGradient):
    """The derivative of the whole loss by the bits, rounding passed straight through."""

    def __call__(self, step):
        return [gradient / step.loss_scale for gradient in step.bit_gradients]


@register
class Paper(BitGradient):
    """The published formulas: the bits see the quantization error and the price, not the task.

        dQ/dB = sum (W~ - W) * (-d) * Z

    with step `d` and integer codes `Z` held fixed. (`-d` for `dd/dB` is printed; the derivative
    of `d = range / 2**B` is `-ln(2) * d`. Only the sign matters.)

    Source: Raghavan et al., "BitNet: Bit-Regularized Deep Neural Networks", arXiv 1708.04788.
    """

    def __call__(self, step):
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        return [
            step.quantization_reg * self.error_slope(kernel) / replicas + price_gradient
            for kernel, price_gradient in zip(step.kernels, step.price_gradients, strict=True)
        ]

    def before_update(self, kernels):
        for kernel in kernels:
            kernel.project()

    @staticmethod
    def error_slope(kernel):
        """`dQ/dB` of one kernel, a float32 scalar."""
        codes, grid = kernel.encode()
        codes = tf.cast(codes, tf.float32)
        residual = grid.step * (codes + grid.offset) - tf.cast(kernel.kernel.value, tf.float32)
        return -math.log(2.0) * tf.reduce_sum(residual * grid.step * codes)


BIT_GRADIENTS = {"straight_through": StraightThrough, "paper": Paper}
