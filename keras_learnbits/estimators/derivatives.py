"""Estimators that differentiate with respect to the bit-widths: `StraightThrough`, `Paper`."""

import math

import tensorflow as tf

from keras_learnbits.estimators.base import BitGradient
from keras_learnbits.serialization import register


class Derivative(BitGradient):
    """Base class of the estimators that approximate the effect of one bit by a derivative."""

    def task_gradients(self, step):
        """Derivatives of the loss, without the price, shape `(layers,)`."""
        raise NotImplementedError

    def __call__(self, step):
        return self.task_gradients(step) + step.price_gradients

    def predict(self, step):
        slopes = self.task_gradients(step)
        return tf.stack([-slopes, slopes], axis=1)


@register
class StraightThrough(Derivative):
    """The derivative of the loss with respect to the bits, straight through the rounding."""

    def task_gradients(self, step):
        return tf.stack([step.bit_gradients[t] for t in step.tensors]) / step.loss_unit


@register
class Paper(Derivative):
    """The published method: bit-widths follow the gradient of quantization error plus price.

    With min-max grids (`MinMaxQuantizer`), step `d` and integer codes `Z`, held fixed,

        loss   task(W) + quantization_reg * sum 1/2 ||W~ - W||^2 + bit_reg * sum 2^B
        bits   dQ/dB = sum (W~ - W) * dd/dB * Z,    dd/dB = -ln(2) * d

    The task's loss is computed with the float kernels `W`. The quantized kernels `W~` are evaluated
    and stored. The paper prints `-d` for `dd/dB` and `2^B` for the price's derivative: `ln 2` is
    left out in both, so the sign is the same.

    By default prices and penalties are the published ones, and bits move by whole bits. The
    published schedule and dead zone depend on the learning rate of the weights; see
    `experiments/recipes.py`.

    Source: Raghavan et al., "BitNet: Bit-Regularized Deep Neural Networks", arXiv 1708.04788,
    equations 1, 2, 4 and 5.
    """

    kernels_only = True
    takes_bit_gradients = False
    trains_float_kernels = True
    compile_defaults = {
        "bit_reg": 1e-6,
        "quantization_reg": 1e-3,
        "bit_penalty": "levels",
        "quantization_error": "squared",
    }
    bit_learning_rate = 1.0

    def task_gradients(self, step):
        slopes = [self.error_slope(kernel) for kernel in step.tensors]
        return step.error_term.weight * tf.stack(slopes)

    @staticmethod
    def error_slope(kernel):
        """`dQ/dB` of one kernel, a float32 scalar."""
        codes, grid = kernel.encode()
        codes = tf.cast(codes, tf.float32)
        residual = grid.step * (codes + grid.offset) - tf.cast(kernel.kernel.value, tf.float32)
        return -math.log(2.0) * tf.reduce_sum(residual * grid.step * codes)
