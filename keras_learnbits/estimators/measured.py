"""`Measured`: loss changes at adjacent bit-widths, measured."""

import tensorflow as tf

from keras_learnbits.estimators.adjacent_widths import AdjacentWidths, allowed_moves, movable
from keras_learnbits.serialization import register


@register
class Measured(AdjacentWidths):
    """Measures the change of the loss on the current batch, one layer per probe.

    A probe costs one forward pass, alternately at one bit fewer and at one bit more, in which all
    kernels are rounded again, and two passes over all kernels for the changes of their errors. It
    runs as the training step ran: with its dropout, and with the batch's statistics in batch
    normalization. Layers take turns, so a model of `L` layers needs about `3 * L * interval` steps
    to go from 8 bits to 2. With synchronized batch normalization a probe runs twice, in inference
    mode, because replicas cannot communicate within `tf.cond`. Random numbers of `tf.random` differ
    from pass to pass: use `keras.random`.
    """

    def probe(self, step, errors):
        layers = len(step.tensors)
        turns = movable(step.tensors)
        probes = tf.cast(self.steps.value // self.interval, tf.int32)
        index = tf.gather(turns, probes % len(turns))
        for_fewer = probes // len(turns) % 2 == 0
        at_turn = tf.one_hot(index, layers)
        may_fall, may_rise = (tf.gather(each, index) for each in allowed_moves(step.tensors))
        down = tf.logical_and(may_fall, tf.logical_or(for_fewer, tf.logical_not(may_rise)))
        change = step.loss_changes(tf.where(down, -at_turn, at_turn)[None])
        directions = tf.stack([down, tf.logical_not(down)])
        measured = tf.logical_and(at_turn[:, None] > 0, directions)
        return tf.where(measured, change, 0.0), measured

    def predict(self, step):
        identity = tf.eye(len(step.tensors))
        return tf.stack([step.loss_changes(-identity), step.loss_changes(identity)], axis=1)
