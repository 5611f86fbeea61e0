"""Moves by a whole bit: which ones there are, what they change, and which one gains most."""

from typing import NamedTuple

import tensorflow as tf

from keras_learnbits import ops
from keras_learnbits.layers.tensors import integer_widths


class Moves(NamedTuple):
    """What one bit fewer and one more change in each layer; 0 where there is no such width.

    With `q` the levels of a kernel `W` at its width, `q'` at the other, and `g` the gradient of the
    task's loss on this batch by the levels. Each is a float32 tensor of shape `(layers, 2)`.

    Attributes:
        errors: Change of the squared error, `||q' - W||^2 - ||q - W||^2`.
        slopes: What the loss would change by if it were linear, `g (q' - q)`; 0 where there is no
            gradient, as for activations.
        distances: `||q' - q||^2`; for activations the size of the change of the error.
    """

    errors: tf.Tensor
    slopes: tf.Tensor
    distances: tf.Tensor


def moves_of(step, errors=None):
    """The moves that a step may choose from.

    Args:
        step: `keras_learnbits.bit_gradients.BitStep`.
        errors: The layers' squared errors, where they are known.

    Returns:
        `Moves`.
    """
    tensors = step.tensors
    levels = [tensor.levels() for tensor in tensors]
    gradients = unregularized_gradients(step)

    def at(widths):
        widths = tf.unstack(widths, num=len(tensors))
        each = zip(tensors, widths, levels, gradients, strict=True)
        return tf.stack([tensor.at_other_bits(*others) for tensor, *others in each])

    # A loop, so that it is traced once.
    widths = neighbours(tensors)
    found = tf.map_fn(at, widths, parallel_iterations=1)
    # Where there is no neighbour, exactly 0, however levels and errors were compiled.
    is_other = tf.not_equal(widths, integer_widths(tensors))[:, :, None]
    present = tf.stack(errors or [tensor.squared_error() for tensor in tensors])
    found = tf.where(is_other, found - tf.one_hot(0, 3) * present[:, None], 0.0)
    changes, slopes, distances = tf.unstack(tf.stop_gradient(tf.transpose(found)), num=3)
    # The gradient by the kernel has the pull of its error, `2 r (W - q)`, which times `q' - q` is:
    pull = step.error_weights()[:, None] * (distances - changes)
    return Moves(changes, slopes / step.loss_unit - pull, distances)


def unregularized_gradients(step):
    """Gradients of the scaled loss by the kernels but for what their regularizers add.

    Args:
        step: `keras_learnbits.bit_gradients.BitStep`.

    Returns:
        List of a tensor or None for each layer.
    """

    def without_regularizer(gradient, kernel):
        value = tf.convert_to_tensor(kernel.value)
        with tf.GradientTape() as tape:
            tape.watch(value)
            penalty = kernel.regularizer(value)
        of_penalty = tf.cast(tape.gradient(penalty, value), tf.float32)
        return tf.cast(gradient, tf.float32) - step.loss_unit * of_penalty

    return [
        gradient
        if gradient is None or tensor.kernel.regularizer is None
        else without_regularizer(gradient, tensor.kernel)
        for gradient, tensor in zip(step.kernel_gradients, step.tensors, strict=True)
    ]


def neighbours(tensors):
    """The bit-widths one below and one above, within what grids allow, shape `(2, layers)`."""
    bits = integer_widths(tensors)
    return tf.stack([tf.maximum(bits - 1, ops.MIN_BITS), tf.minimum(bits + 1, ops.MAX_BITS)])


def movable(tensors):
    """Places of the layers whose bounds leave them more than one width."""
    bounds = [(tensor.layer.min_bits, tensor.layer.max_bits) for tensor in tensors]
    return [place for place, (low, high) in enumerate(bounds) if low < high]


def room(tensors):
    """Whether each layer may take a bit fewer, and a bit more: two tensors `(layers,)`."""
    bits = integer_widths(tensors)
    low = tf.constant([float(tensor.layer.min_bits) for tensor in tensors])
    high = tf.constant([float(tensor.layer.max_bits) for tensor in tensors])
    return bits > low, bits < high


def whole_bit_gradients(loss_changes, price_changes, may_fall, may_rise):
    """1 where one bit fewer lowers loss plus price, -1 where one more does, else 0.

    Args:
        loss_changes: With one bit fewer and one more, shape `(layers, 2)`.
        price_changes: Likewise.
        may_fall: Where one bit fewer is allowed, shape `(layers,)`.
        may_rise: Where one bit more is.

    Returns:
        Float32 tensor of shape `(layers,)`.

    Examples:
        >>> changes = tf.constant([[0.3, -0.1], [0.1, -0.05], [0.9, -0.3]])
        >>> prices = tf.constant([[-0.2, 0.2]] * 3)
        >>> whole_bit_gradients(changes, prices, [True] * 3, [True] * 3).numpy().tolist()
        [0.0, 1.0, -1.0]
    """
    total = loss_changes + price_changes
    allowed = tf.stack([may_fall, may_rise], axis=1)
    gain = tf.where(allowed, tf.maximum(-total, 0.0), 0.0)
    return tf.sign(gain[:, 0] - gain[:, 1])
