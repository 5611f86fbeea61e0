"""How much loss each layer's rounding costs: what looks have shown, with what layers share."""

import math

import tensorflow as tf

from keras_learnbits.numerics.grids import TINY

# Looks at a layer after which what was seen counts 1/e.
MEMORY = 5
KEPT = math.exp(-1 / MEMORY)
# The running mean of ones after two looks lies below this, after three above.
THREE_LOOKS = 1 - KEPT**2.5
# A standard error beyond all others; finite, for those who debug with
# `tf.debugging.enable_check_numerics`.
UNKNOWN = 1e30


def sensitivities(loss_changes, error_changes, variances, looked_at, energies):
    """Loss per squared error of each layer, and how uncertain its looks leave it.

    A look is noisy, and a layer has few. So what a layer has shown, the ratio `r` of the running
    means of its looks with a standard error `e`, is weighed with what the others have shown, as in
    empirical Bayes (Efron and Morris, "Stein's estimation rule and its competitors", 1973). What
    layers have in common is the loss per *relative* error, `||q - W||^2 / ||W||^2`, since rounding
    noise matters beside the signal. With all in this unit, `p` the ratio of sums over the layers,
    and `m` the mean of `max(r, 0)` with weights `1 / (p^2 + e^2)`, from which layers differ by some
    `m`,

        s = (m^2 r + e^2 m) / (m^2 + e^2)

    but never below 0. Before a layer's third look it is `m`; before any, 0.

    The variance of a look is taken to grow as the error that it adds: what is left of the slope of
    the batch, `g (q' - q)`, does. So looks at one width tell of the noise at others.

    Args:
        loss_changes: Running means of what a look at fewer bits added to the loss, or a look at
            more bits took off it, shape `(layers,)`.
        error_changes: Likewise of the squared errors.
        variances: Likewise of `look_variances`, from the second look on.
        looked_at: Running mean of ones, which says by how much the others still fall short.
        energies: `||W||^2`.

    Returns:
        `s` and `e` per squared error, float32 tensors of shape `(layers,)`; `e` is `UNKNOWN`
        before the third look.

    Examples:
        >>> ones = tf.ones(2)
        >>> def found(variance):
        ...     looks = tf.constant([0.9, 0.1]), ones, variance * ones, ones, ones
        ...     return sensitivities(*looks)[0].numpy()
        >>> found(variance=1e-9), found(variance=1e9)
        (array([0.9, 0.1], dtype=float32), array([0.5, 0.5], dtype=float32))
    """
    error_change = tf.math.divide_no_nan(error_changes, looked_at)
    # Kernels that have just left zero have less energy than error.
    energies = tf.maximum(energies, tf.maximum(error_change, TINY))
    shown = tf.math.divide_no_nan(loss_changes, error_changes) * energies
    certain = looked_at > THREE_LOOKS
    of_variances = tf.maximum(1.0 - (1.0 - looked_at) / KEPT, 0.0)  # one look less
    of_mean = (1 - KEPT) / (1 + KEPT) * (2.0 - looked_at)  # squares of the weights in a mean
    variance = tf.math.divide_no_nan(of_mean * variances, of_variances * error_changes)
    variance = tf.where(certain, variance * energies**2, 0.0)

    pooled = tf.math.divide_no_nan(
        tf.reduce_sum(tf.math.divide_no_nan(loss_changes, looked_at)),
        tf.reduce_sum(error_change / energies),
    )
    pooled = tf.maximum(pooled, 0.0)
    weights = tf.where(certain, 1.0 / tf.maximum(pooled**2 + variance, TINY), 0.0)
    weights = tf.math.divide_no_nan(weights, tf.reduce_sum(weights))
    # What fewer bits are shown to lower counts as 0, which a sensitivity is at least.
    of_certain = tf.reduce_sum(weights * tf.maximum(shown, 0.0))
    mean = tf.where(tf.reduce_any(certain), of_certain, pooled)

    share = tf.where(certain, tf.math.divide_no_nan(mean**2, mean**2 + variance), 0.0)
    found = tf.maximum(share * shown + (1.0 - share) * mean, 0.0)
    error = tf.where(certain, tf.sqrt(variance) / energies, UNKNOWN)
    return found / energies, error


def look_variances(loss_change, error_change, loss_changes, error_changes):
    """Variance of a look per squared error, as one more look at each layer shows it.

    It is the squared difference of the look from what the looks before have shown. Their noise is
    in it, too, so it is on the large side: by half where widths stay, threefold where each look is
    a bit lower. That suits what a few looks can tell.

    Args:
        loss_change: What the look shows, shape `(layers,)`.
        error_change: Likewise of the squared error.
        loss_changes, error_changes: As for `sensitivities`, before this look.

    Returns:
        Float32 tensor of shape `(layers,)`.
    """
    shown = tf.math.divide_no_nan(loss_changes, error_changes)
    surprise = loss_change - shown * error_change
    return tf.math.divide_no_nan(surprise**2, error_change)


def updated(mean, new):
    """A running mean that has begun at 0, after one more value."""
    return KEPT * mean + (1 - KEPT) * new


def over_directions(loss_changes, error_changes):
    """Changes with fewer bits less those with more: losses and errors, shape `(layers,)`.

    Weights that have grown used to a width make fewer bits look dearer, and more bits worth less,
    than they are once training has gone on. So both directions are taken together.
    """
    losses = tf.reduce_sum(loss_changes * tf.sign(error_changes), axis=1)
    return losses, tf.reduce_sum(tf.abs(error_changes), axis=1)
