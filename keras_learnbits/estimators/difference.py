"""`Difference`: loss changes at adjacent bit-widths, predicted from gradients."""

import tensorflow as tf

from keras_learnbits.estimators.adjacent_widths import WholeBit, _neighbours
from keras_learnbits.serialization import register


@register
class Difference(WholeBit):
    """Predicts the change of the loss from gradients: no derivative by bits, no further pass.

    With `q` the kernel at its bit-width, `q'` at another, `Q` the squared error, `r` the loss per
    squared error of the quantization error's term, and `g` the gradient by the kernel without
    that term,

        loss(q') - loss(q) = g (q' - q) + (1/2 F + r) (Q' - Q),    F = batch_size * mean(g**2)

    where `F`, one number a layer, is the empirical Fisher information. The pull of a kernel
    regularizer, which rounding does not change, is left out, too.
    """

    kernels_only = True

    def look(self, step, errors):
        rows, error_weights = [], tf.unstack(step.error_weights(), num=len(step.tensors))
        neighbours = tf.unstack(_neighbours(step.tensors), num=len(step.tensors), axis=1)
        for place, (kernel, widths) in enumerate(zip(step.tensors, neighbours, strict=True)):
            quantized, kernel_value = kernel.quantized(), tf.cast(kernel.kernel.value, tf.float32)
            gradient = tf.cast(step.kernel_gradients[place], tf.float32) / step.loss_unit
            of_error = error_weights[place]
            gradient -= 2.0 * of_error * (kernel_value - quantized)
            gradient -= _pull_of_regularizer(kernel.kernel)
            fisher = tf.cast(step.batch_size, tf.float32) * tf.reduce_mean(tf.square(gradient))
            first_order = [
                tf.reduce_sum(gradient * (kernel.quantized_at(bits) - quantized))
                for bits in tf.unstack(widths, num=2)
            ]
            rows.append(tf.stack(first_order) + (0.5 * fisher + of_error) * errors[place])
        return tf.stack(rows), tf.not_equal(errors, 0.0)


def _pull_of_regularizer(kernel):
    """Gradient of a kernel's regularizer by the kernel, float32; 0 where there is none."""
    if kernel.regularizer is None:
        return 0.0
    value = tf.convert_to_tensor(kernel.value)
    with tf.GradientTape() as tape:
        tape.watch(value)
        penalty = kernel.regularizer(value)
    return tf.cast(tape.gradient(penalty, value, unconnected_gradients="zero"), tf.float32)
