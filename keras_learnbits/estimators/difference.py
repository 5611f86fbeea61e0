"""`Difference`: loss changes at adjacent bit-widths, predicted from gradients."""

import tensorflow as tf

from keras_learnbits.estimators.adjacent_widths import AdjacentWidths, adjacent_widths
from keras_learnbits.serialization import register


@register
class Difference(AdjacentWidths):
    """Predicts the change of the loss from gradients, without another forward pass.

    With `q` the kernel at its bit-width, `q'` at another, `Q` the squared error, `r` the loss per
    squared error of the quantization error's term, and `g` the gradient with respect to the
    kernel without that term,

        loss(q') - loss(q) = g (q' - q) + (1/2 F + r) (Q' - Q),    F = batch_size * mean(g**2)

    where `F`, one number per layer, is the empirical Fisher information. The gradient of a kernel
    regularizer is subtracted from `g`, because rounding does not change the regularizer's loss.
    """

    kernels_only = True

    def probe(self, step, errors):
        layers = len(step.tensors)
        error_weights = tf.unstack(step.error_weights(), num=layers)
        widths = tf.unstack(adjacent_widths(step.tensors), num=layers, axis=1)
        rows = []
        for index, kernel in enumerate(step.tensors):
            quantized, kernel_value = kernel.quantized(), tf.cast(kernel.kernel.value, tf.float32)
            gradient = tf.cast(step.kernel_gradients[kernel], tf.float32) / step.loss_unit
            of_error = error_weights[index]
            gradient -= 2.0 * of_error * (kernel_value - quantized)
            gradient -= _regularizer_gradient(kernel.kernel)
            fisher = tf.cast(step.batch_size, tf.float32) * tf.reduce_mean(tf.square(gradient))
            first_order = [
                tf.reduce_sum(gradient * (kernel.quantized_at(bits) - quantized))
                for bits in tf.unstack(widths[index], num=2)
            ]
            rows.append(tf.stack(first_order) + (0.5 * fisher + of_error) * errors[index])
        return tf.stack(rows), tf.not_equal(errors, 0.0)


def _regularizer_gradient(kernel):
    """Gradient of a kernel's regularizer with respect to it, float32; 0 if it has none."""
    if kernel.regularizer is None:
        return 0.0
    value = tf.convert_to_tensor(kernel.value)
    with tf.GradientTape() as tape:
        tape.watch(value)
        penalty = kernel.regularizer(value)
    return tf.cast(tape.gradient(penalty, value, unconnected_gradients="zero"), tf.float32)
