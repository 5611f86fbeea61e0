"""How much loss each layer's rounding costs: what looks have shown, with what layers share."""

import math

import numpy as np
import tensorflow as tf

# Looks at a layer after which what was seen counts 1/e.
MEMORY = 5
KEPT = math.exp(-1 / MEMORY)
# The running mean of ones after two looks lies below this, after three above.
THREE_LOOKS = 1 - KEPT**2.5


def sensitivities(loss_changes, error_changes, variances, looked_at, energies):
    """Loss per squared error of each layer, and how uncertain looks leave it.

    A look is noisy, and a layer has few. So what a layer has shown, the ratio `r` of the running
    means of its looks with a standard error `e`, is weighed with what all layers have shown
    together, as in empirical Bayes (Efron and Morris, "Stein's estimation rule and its
    competitors", 1973). What layers have in common is the loss per *relative* error, `p`, for
    rounding noise matters beside the signal; they differ from it by some `p`. With
    `P = p / ||W||^2`,

        s = (P^2 r + e^2 P) / (P^2 + e^2)

    but never below 0. Before a layer's third look it is `P`; before any, 0.

    The noise is mostly the slope of the batch, `g (q' - q)`: its variance grows as `||q' - q||^2`,
    so it is taken per squared error, and looks at other widths tell of it, too.

    Args:
        loss_changes: Running means of what a look at fewer bits added to the loss, or a look at
            more bits took off it, shape `(layers,)`.
        error_changes: Likewise of the squared errors.
        variances: Running mean of the squared difference of a look from what the looks before had
            shown, per squared error; from the second look on.
        looked_at: Running mean of ones, which says by how much the others still fall short.
        energies: `||W||^2`.

    Returns:
        `s` and `e`, float32 tensors of shape `(layers,)`; `e` is infinite before the third look.

    Examples:
        >>> ones = tf.ones(2)
        >>> def found(variance):
        ...     looks = tf.constant([0.9, -0.1]), ones, variance * ones, ones, ones
        ...     return sensitivities(*looks)[0].numpy().round(2).tolist()
        >>> found(variance=1e-9), found(variance=1e9)
        ([0.9, 0.0], [0.4, 0.4])
    """
    # From here on losses per relative error.
    error_changes = tf.math.divide_no_nan(error_changes, energies)
    shown = tf.math.divide_no_nan(loss_changes, error_changes)
    loss_change = tf.math.divide_no_nan(loss_changes, looked_at)
    error_change = tf.math.divide_no_nan(error_changes, looked_at)
    common = tf.math.divide_no_nan(tf.reduce_sum(loss_change), tf.reduce_sum(error_change))
    common = tf.maximum(common, 0.0)

    of_variances = tf.maximum(1.0 - (1.0 - looked_at) / KEPT, 0.0)  # one look less
    of_mean = (1 - KEPT) / (1 + KEPT) * tf.math.divide_no_nan(2.0 - looked_at, looked_at)
    variance = of_mean * tf.math.divide_no_nan(variances * energies, of_variances * error_change)
    variance = tf.where(looked_at > THREE_LOOKS, variance, np.inf)

    share = tf.math.divide_no_nan(common**2, common**2 + variance)  # of what it has shown itself
    found = tf.maximum(share * shown + (1.0 - share) * common, 0.0)
    return tuple(tf.math.divide_no_nan(each, energies) for each in (found, tf.sqrt(variance)))


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
