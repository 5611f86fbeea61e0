"""`Measured`: loss changes at adjacent bit-widths, measured."""

import tensorflow as tf

from keras_learnbits.estimators.adjacent_widths import WholeBit, movable, room
from keras_learnbits.serialization import register


@register
class Measured(WholeBit):
    """Measures the change of the loss: one layer at a look, on the batch at hand.

    A look costs one forward pass, at one bit fewer or at one more, in turns. It runs as the
    training step ran: with its dropout, and with batch normalization by the batch. Layers take
    turns, too, so a net of `L` layers needs some `3 * L * interval` steps to go from 8 bits to 2.
    Where replicas synchronize batch normalization, which they cannot do in a look, it costs two
    passes in inference mode. Random numbers of `tf.random` differ from pass to pass: take Keras's.
    """

    def look(self, step, errors):
        layers = len(step.tensors)
        turns = movable(step.tensors)
        looks = tf.cast(self.steps.value // self.interval, tf.int32)
        place = tf.gather(turns, looks % len(turns))
        for_fewer = looks // len(turns) % 2 == 0
        at_turn = tf.one_hot(place, layers)
        may_fall, may_rise = (tf.gather(each, place) for each in room(step.tensors))
        down = tf.logical_and(may_fall, tf.logical_or(for_fewer, tf.logical_not(may_rise)))
        change = step.loss_changes(tf.where(down, -at_turn, at_turn)[None])
        directions = tf.stack([down, tf.logical_not(down)])
        seen = tf.logical_and(at_turn[:, None] > 0, directions)
        return tf.where(seen, change, 0.0), seen

    def predict(self, step):
        identity = tf.eye(len(step.tensors))
        return tf.stack([step.loss_changes(-identity), step.loss_changes(identity)], axis=1)
