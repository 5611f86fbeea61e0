"""Terms that are added to the task's loss: penalties on bits, and quantization errors."""

import tensorflow as tf

from keras_learnbits.numerics import grids


def mean_bits(bits, shares):
    """Mean bits per weight, `sum N_l b_l / sum N_l`, i.e. the storage.

    It is a mean, so that the same `bit_reg` suits models of any size. If activations are quantized
    too, their mean bits per value are added.

    Args:
        bits: Float32 tensor of shape `(..., layers)`.
        shares: Float32 tensor of shape `(layers,)`, each layer's share of all weights, or of all
            activation values.

    Returns:
        Float32 tensor of the shape of `bits`, each layer's term of the sum.

    Examples:
        >>> mean_bits(tf.constant([2.0, 4.0]), tf.constant([0.75, 0.25])).numpy().tolist()
        [1.5, 1.0]
    """
    return bits * shares


def levels(bits, shares):
    """The published penalty, `sum_l 2**b_l`, which is the same for small and large layers.

    Args:
        bits: Float32 tensor of shape `(..., layers)`.
        shares: Float32 tensor, not used.

    Returns:
        Float32 tensor of the shape of `bits`, each layer's term of the sum.

    Examples:
        >>> levels(tf.constant([1.0, 3.0]), None).numpy().tolist()
        [2.0, 8.0]
    """
    del shares
    return 2.0**bits


def widths(bits, shares):
    """The penalty of the published study of the learning rate, `sum_l b_l`.

    Args:
        bits: Float32 tensor of shape `(..., layers)`.
        shares: Float32 tensor, not used.

    Returns:
        Float32 tensor of the shape of `bits`, each layer's term of the sum.

    Examples:
        >>> widths(tf.constant([1.0, 3.0]), None).numpy().tolist()
        [1.0, 3.0]
    """
    del shares
    return tf.identity(bits)


BIT_PENALTIES = {"bits": mean_bits, "levels": levels, "widths": widths}


def relative_error(squared_errors, squared_norms, shares):
    """Relative quantization error of a model: `||q - W||^2 / ||W||^2`, averaged over layers.

    Layers are weighted by their number of weights. 0 means no error; 1 is the error if all weights
    were rounded to 0. Each layer's ratio is at most 1; for a kernel of zeros the error would exceed
    the squared norm, because symmetric grids have no level at 0.

    Args:
        squared_errors: Float32 tensor of shape `(layers,)`, `||q - W||^2`.
        squared_norms: Float32 tensor of shape `(layers,)`, `||W||^2`; constants for gradients.
        shares: Float32 tensor of shape `(layers,)`, each layer's share of all weights.

    Returns:
        Float32 scalar.

    Examples:
        >>> shares = tf.constant([0.75, 0.25])
        >>> relative_error(tf.constant([1.0, 0.0]), tf.constant([4.0, 1.0]), shares).numpy().item()
        0.1875
    """
    squared_norms = tf.stop_gradient(tf.maximum(squared_norms, squared_errors))
    squared_norms = tf.maximum(squared_norms, grids.TINY)
    return tf.reduce_sum(shares * squared_errors / squared_norms)


def half_squared_error(squared_errors, squared_norms, shares):
    """The published quantization error, `sum_l 1/2 ||q - W||^2`.

    Examples:
        >>> half_squared_error(tf.constant([1.0, 3.0]), None, None).numpy().item()
        2.0
    """
    del squared_norms, shares
    return 0.5 * tf.reduce_sum(squared_errors)


QUANTIZATION_ERRORS = {"relative": relative_error, "squared": half_squared_error}
