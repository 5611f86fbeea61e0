"""`Measured`: loss changes at other bit-widths, measured."""

import tensorflow as tf

from keras_learnbits.estimators.adjacent_widths import AdjacentWidths, allowed_moves, movable
from keras_learnbits.layers.quantized_tensors import integer_widths
from keras_learnbits.serialization import register

# Bit-width at which kernels of more bits are probed. A bit fewer quadruples the squared error, and
# what it adds to the loss, but only doubles the noise: the slope `g (q' - q)` of the batch, whose
# variance is proportional to the squared error. At 1 bit the loss grows faster than the error.
PROBED_BITS = 2


@register
class Measured(AdjacentWidths):
    """Measures the change of the loss on the current batch, one layer per probe.

    A kernel of more than 3 bits is probed at 2 bits, or at `min_bits` if that is more, because one
    bit fewer would show little but noise. Kernels of 3 bits or fewer, and activations, are probed
    at one bit fewer and at one more in turn. The change of the squared error at that width tells
    how sensitive the loss is to it.

    A probe costs one forward pass, in which all kernels are rounded again, and three passes over
    all kernels for the changes of their errors. It runs as the training step ran: with its dropout,
    and with the batch's statistics in batch normalization. Layers take turns, so a model of `L`
    layers needs about `3 * L * interval` steps to go from 8 bits to 2. With synchronized batch
    normalization a probe runs twice, in inference mode, because replicas cannot communicate within
    `tf.cond`. Random numbers of `tf.random` differ from pass to pass: use `keras.random`.
    """

    def probe(self, step, errors):
        layers = len(step.tensors)
        turns = movable(step.tensors)
        probes = tf.cast(self.steps.value // self.interval, tf.int32)
        index = tf.gather(turns, probes % len(turns))
        for_fewer = probes // len(turns) % 2 == 0
        at_turn = tf.one_hot(index, layers)
        bits, lower = integer_widths(step.tensors)[index], self.lower_widths(step.tensors)[index]
        may_fall, may_rise = (tf.gather(each, index) for each in allowed_moves(step.tensors))
        is_far = lower < bits - 1
        down = tf.logical_and(may_fall, for_fewer | is_far | ~may_rise)
        width = tf.where(down, lower, bits + 1)
        change = step.loss_changes((at_turn * (width - bits))[None])
        measured = tf.logical_and(at_turn[:, None] > 0, tf.stack([down, ~down]))
        return tf.where(measured, change, 0.0), measured

    def lower_widths(self, tensors):
        low = tf.constant([float(tensor.layer.min_bits) for tensor in tensors])
        # The squared error of activations is a model without clipping, which fails at 2 bits.
        of_kernels = tf.constant([hasattr(tensor, "kernel") for tensor in tensors])
        fewer = integer_widths(tensors) - 1
        return tf.maximum(tf.where(of_kernels, tf.minimum(fewer, PROBED_BITS), fewer), low)

    def predict(self, step):
        identity = tf.eye(len(step.tensors))
        return tf.stack([step.loss_changes(-identity), step.loss_changes(identity)], axis=1)
