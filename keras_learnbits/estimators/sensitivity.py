"""How sensitive the loss is to each layer's rounding, estimated from probes."""

import math

import tensorflow as tf

from keras_learnbits.numerics.grids import TINY

# Number of probes of a layer over which the weight of an earlier probe falls to 1/e.
MEMORY = 5
KEPT = math.exp(-1 / MEMORY)
# A layer had three probes or more if its running mean of ones exceeds this.
THREE_PROBES = 1 - KEPT**2.5
# A standard error that exceeds all others. It is finite, so that
# `tf.debugging.enable_check_numerics` does not stop on it.
UNKNOWN = 1e30


def sensitivities(loss_changes, error_changes, variances, weights, squared_norms):
    """Loss per squared error of each layer, and its standard error.

    A probe is noisy, and a layer has few of them. So the estimate of a layer, the ratio `r` of the
    running means of its probes with a standard error `e`, is shrunk towards the mean of all, as
    in empirical Bayes (Efron and Morris, "Stein's estimation rule and its competitors", 1973). The
    quantity that is similar in all layers is the loss per *relative* error,
    `||q - W||^2 / ||W||^2`, because rounding noise matters relative to the signal. In this unit,
    with `p` the ratio of the sums over the layers, and `m` the mean of `max(r, 0)` with weights
    `1 / (p^2 + e^2)`, from which layers are assumed to differ by about `m`,

        s = (m^2 r + e^2 m) / (m^2 + e^2)

    but never below 0. Before a layer's third probe it is `m`; before any probe, 0.

    The variance of a probe is assumed to be proportional to the squared error that it adds, as is
    that of the remaining first-order term `g (q' - q)` of the batch. So the noise at other widths
    follows from probes at one width.

    Args:
        loss_changes: Running means of the loss that a probe at fewer bits added, or that a probe
            at more bits removed, shape `(layers,)`.
        error_changes: Running means of the changes of the squared errors, shape `(layers,)`.
        variances: Running means of `probe_variances`, from the second probe on.
        weights: Running means of ones, by which the other means are corrected for their start at 0.
        squared_norms: Squared norms `||W||^2`, shape `(layers,)`.

    Returns:
        `s` and `e` per squared error, float32 tensors of shape `(layers,)`; `e` is `UNKNOWN`
        before the third probe.

    Examples:
        >>> ones = tf.ones(2)
        >>> def found(variance):
        ...     means = tf.constant([0.9, 0.1]), ones, variance * ones, ones, ones
        ...     return sensitivities(*means)[0].numpy()
        >>> found(variance=1e-9), found(variance=1e9)
        (array([0.9, 0.1], dtype=float32), array([0.5, 0.5], dtype=float32))
    """
    error_change = tf.math.divide_no_nan(error_changes, weights)
    # A kernel that has just left zero has a squared norm below its squared error.
    squared_norms = tf.maximum(squared_norms, tf.maximum(error_change, TINY))
    shown = tf.math.divide_no_nan(loss_changes, error_changes) * squared_norms
    certain = weights > THREE_PROBES
    of_variances = tf.maximum(1.0 - (1.0 - weights) / KEPT, 0.0)  # one probe fewer
    of_mean = (1 - KEPT) / (1 + KEPT) * (2.0 - weights)  # sum of the squared weights in a mean
    variance = tf.math.divide_no_nan(of_mean * variances, of_variances * error_changes)
    variance = tf.where(certain, variance * squared_norms**2, 0.0)

    pooled = tf.math.divide_no_nan(
        tf.reduce_sum(tf.math.divide_no_nan(loss_changes, weights)),
        tf.reduce_sum(error_change / squared_norms),
    )
    pooled = tf.maximum(pooled, 0.0)
    precision = tf.where(certain, 1.0 / tf.maximum(pooled**2 + variance, TINY), 0.0)
    precision = tf.math.divide_no_nan(precision, tf.reduce_sum(precision))
    # A sensitivity is at least 0, so a negative ratio counts as 0.
    of_certain = tf.reduce_sum(precision * tf.maximum(shown, 0.0))
    mean = tf.where(tf.reduce_any(certain), of_certain, pooled)

    share = tf.where(certain, tf.math.divide_no_nan(mean**2, mean**2 + variance), 0.0)
    found = tf.maximum(share * shown + (1.0 - share) * mean, 0.0)
    error = tf.where(certain, tf.sqrt(variance) / squared_norms, UNKNOWN)
    return found / squared_norms, error


def probe_variances(loss_change, error_change, loss_changes, error_changes):
    """Variance of a probe per squared error, estimated from one more probe of each layer.

    It is the squared difference between the probe and the prediction of the earlier probes. The
    estimate is biased upwards, because the running mean is itself noisy: by half if widths stay,
    and threefold if each probe is one bit lower.

    Args:
        loss_change: Change of the loss in the probe, shape `(layers,)`.
        error_change: Change of the squared error in the probe, shape `(layers,)`.
        loss_changes: Running means before this probe, as for `sensitivities`.
        error_changes: Running means before this probe, as for `sensitivities`.

    Returns:
        Float32 tensor of shape `(layers,)`.
    """
    shown = tf.math.divide_no_nan(loss_changes, error_changes)
    surprise = loss_change - shown * error_change
    return tf.math.divide_no_nan(surprise**2, error_change)


def updated(mean, new):
    """A running mean, initially 0, after one more value."""
    return KEPT * mean + (1 - KEPT) * new


def over_directions(loss_changes, error_changes):
    """Changes with fewer bits minus changes with more: losses and errors, shape `(layers,)`.

    Weights adapt to their width: just after a change, fewer bits seem to cost more, and more bits
    to gain less, than after further training. Averaging both directions balances the two biases
    where a layer is probed in both.
    """
    losses = tf.reduce_sum(loss_changes * tf.sign(error_changes), axis=1)
    return losses, tf.reduce_sum(tf.abs(error_changes), axis=1)
