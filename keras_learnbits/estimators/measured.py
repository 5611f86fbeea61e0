"""`Measured`: loss changes at other bit-widths, measured."""

import tensorflow as tf

from keras_learnbits.estimators.adjacent_widths import AdjacentWidths, allowed_moves, movable
from keras_learnbits.layers.quantized_tensors import integer_widths
from keras_learnbits.serialization import register


@register
class Measured(AdjacentWidths):
    """Measures the change of the loss on the current batch, one layer per probe.

    Probes are at one bit fewer and at one more in turn. A bit fewer quadruples what rounding adds
    to the loss, and only doubles the noise, the slope `g (q' - q)` of the batch: at many bits a
    probe shows little else. With `probed_bits=2`, kernels of more than 3 bits are probed at 2 bits,
    or at `min_bits` if that is more. Predictions then have a better scale, but so far no training
    ended at better widths.

    A probe costs one forward pass, in which all kernels are rounded again, and two passes over all
    kernels for the changes of their errors (three with `probed_bits`). It runs as the training step
    ran: with its dropout, and with the batch's statistics in batch normalization. Layers take
    turns, so a model of `L` layers needs about `3 * L * interval` steps to go from 8 bits to 2.
    With synchronized batch normalization a probe runs twice, in inference mode, because replicas
    cannot communicate within `tf.cond`. Random numbers of `tf.random` differ from pass to pass: use
    `keras.random`.

    Args:
        interval: Training steps from one probe to the next, an integer >= 1.
        probed_bits: Bit-width, an integer >= 1, at which kernels of more bits are probed; None for
            one bit fewer.

    Raises:
        ValueError: `interval` or `probed_bits` is not an integer, or is below 1.
    """

    def __init__(self, interval=20, probed_bits=None):
        super().__init__(interval)
        if probed_bits is not None and (not isinstance(probed_bits, int) or probed_bits < 1):
            raise ValueError(
                "`probed_bits` must be an integer number of bits >= 1, or None. "
                f"Received: probed_bits={probed_bits!r}"
            )
        self.probed_bits = probed_bits

    def probe(self, step, errors):
        layers = len(step.tensors)
        turns = movable(step.tensors)
        probes = tf.cast(self.steps.value // self.interval, tf.int32)
        index = tf.gather(turns, probes % len(turns))
        for_fewer = probes // len(turns) % 2 == 0
        at_turn = tf.one_hot(index, layers)
        widths, lower = integer_widths(step.tensors), self.lower_widths(step.tensors)
        bits, lower = widths[index], (widths - 1 if lower is None else lower)[index]
        may_fall, may_rise = (tf.gather(each, index) for each in allowed_moves(step.tensors))
        is_far = lower < bits - 1
        down = tf.logical_and(may_fall, for_fewer | is_far | ~may_rise)
        width = tf.where(down, lower, bits + 1)
        change = step.loss_changes((at_turn * (width - bits))[None])
        measured = tf.logical_and(at_turn[:, None] > 0, tf.stack([down, ~down]))
        return tf.where(measured, change, 0.0), measured

    def lower_widths(self, tensors):
        if self.probed_bits is None:
            return None
        low = tf.constant([float(tensor.layer.min_bits) for tensor in tensors])
        # The squared error of activations is a model without clipping, which fails at 2 bits.
        of_kernels = tf.constant([hasattr(tensor, "kernel") for tensor in tensors])
        fewer = integer_widths(tensors) - 1
        return tf.maximum(
            tf.where(of_kernels, tf.minimum(fewer, float(self.probed_bits)), fewer), low
        )

    def predict(self, step):
        identity = tf.eye(len(step.tensors))
        return tf.stack([step.loss_changes(-identity), step.loss_changes(identity)], axis=1)

    def get_config(self):
        return {**super().get_config(), "probed_bits": self.probed_bits}
