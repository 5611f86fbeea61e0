"""What is added to the task loss: what bits cost, and what rounding costs."""

import tensorflow as tf

from keras_learnbits.numerics import grids


def mean_bits(bits, shares):
    """Mean bits per weight, `sum N_l b_l / sum N_l`: the storage, whoever uses it.

    `bit_reg` times this is what one mean bit may cost in loss, the same for every model. Where
    activations are quantized, too, their mean bits per value are added.

    Args:
        bits: Float32 tensor of shape `(..., layers)`.
        shares: Each layer's share of the weights, or of the values of activations.

    Returns:
        Each layer's term of the sum, of the shape of `bits`, in bits.

    Examples:
        >>> mean_bits(tf.constant([2.0, 4.0]), tf.constant([0.75, 0.25])).numpy().tolist()
        [1.5, 1.0]
    """
    return bits * shares


def levels(bits, shares):
    """The published price, `sum_l 2**b_l`, which charges a small layer as much as a big one.

    Args:
        bits: Float32 tensor of shape `(..., layers)`.
        shares: Not used.

    Returns:
        Each layer's term of the sum, of the shape of `bits`.

    Examples:
        >>> levels(tf.constant([1.0, 3.0]), None).numpy().tolist()
        [2.0, 8.0]
    """
    del shares
    return 2.0**bits


def widths(bits, shares):
    """The published price of the study of the learning rate, `sum_l b_l`, the same for all layers.

    Args:
        bits: Float32 tensor of shape `(..., layers)`.
        shares: Not used.

    Returns:
        Each layer's term of the sum, of the shape of `bits`, in bits.

    Examples:
        >>> widths(tf.constant([1.0, 3.0]), None).numpy().tolist()
        [1.0, 3.0]
    """
    del shares
    return tf.identity(bits)


BIT_PENALTIES = {"bits": mean_bits, "levels": levels, "widths": widths}


def relative_error(squared_errors, squared_norms, shares):
    """Quantization error of a model: squared error over squared norm, `||q - W||^2 / ||W||^2`.

    The mean over layers weighted by their numbers of weights, without a unit: 0 is exact, 1 is
    a kernel rounded away. No layer counts more than 1: one that begins at zeros has errors beyond
    its squared norm, since symmetric grids have no level at 0.

    Args:
        squared_errors: `||q - W||^2`, shape `(layers,)`.
        squared_norms: `||W||^2`, shape `(layers,)`; taken as constants.
        shares: Each layer's share of the weights, shape `(layers,)`.

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
