"""Turns probes into decisions: pure functions of tensors with one row per layer."""

from typing import NamedTuple

import tensorflow as tf

from keras_learnbits.estimators.sensitivity import (
    over_directions,
    probe_variances,
    sensitivities,
    updated,
)

# Standard errors by which the gain must exceed 0 before a layer reverses direction.
CERTAINTY = 2
# A layer that is more than this many bits from its last probed width must wait for its next probe.
REACH = 1


class Statistics(NamedTuple):
    """What the probes of each layer have shown, tensors of shape `(layers,)`.

    Attributes:
        loss_changes: Running means of the changes of the loss, as `sensitivities` takes them.
        error_changes: Running means of the changes of the squared errors.
        variances: Running means of `probe_variances`.
        weights: Running means of ones.
        bits: Bit-widths at the latest probe.
    """

    loss_changes: tf.Tensor
    error_changes: tf.Tensor
    variances: tf.Tensor
    weights: tf.Tensor
    bits: tf.Tensor


class Decision(NamedTuple):
    """The latest decision for each layer, tensors of shape `(layers,)`.

    Attributes:
        directions: Latest gradient that was not 0.
        gradients: Latest gradient: 1 for fewer bits, -1 for more, 0 to stay.
        bits: Bit-widths at which it was decided.
    """

    directions: tf.Tensor
    gradients: tf.Tensor
    bits: tf.Tensor


class Prediction(NamedTuple):
    """Predicted changes of the loss.

    Attributes:
        changes: With one bit fewer and with one more, shape `(layers, 2)`.
        noise: Standard errors of what the probes contribute to them, shape `(layers, 2)`.
        known: Whether the layer was probed near its present width, shape `(layers,)`.
    """

    changes: tf.Tensor
    noise: tf.Tensor
    known: tf.Tensor


def learned(old, changes, errors, measured, bits):
    """The statistics after a probe.

    Args:
        old: `Statistics` before the probe.
        changes: Measured changes of the loss, shape `(layers, 2)`.
        errors: Changes of the squared errors, shape `(layers, 2)`.
        measured: Boolean tensor, which changes were measured, shape `(layers, 2)`.
        bits: Bit-widths of the layers, shape `(layers,)`.

    Returns:
        `Statistics`.
    """
    probed = tf.reduce_any(measured, axis=1)
    loss_change, error_change = over_directions(changes, tf.where(measured, errors, 0.0))
    variance = probe_variances(loss_change, error_change, old.loss_changes, old.error_changes)

    def mean(before, value, where=probed):
        return tf.where(where, updated(before, value), before)

    return Statistics(
        loss_changes=mean(old.loss_changes, loss_change),
        error_changes=mean(old.error_changes, error_change),
        variances=mean(old.variances, variance, tf.logical_and(probed, old.weights > 0)),
        weights=mean(old.weights, tf.ones_like(old.weights)),
        bits=tf.where(probed, bits, old.bits),
    )


def predicted(statistics, squared_norms, errors, bits):
    """Predicts the changes of the loss from the statistics.

    Args:
        statistics: `Statistics`.
        squared_norms: Squared norms of the quantized tensors, shape `(layers,)`.
        errors: Changes of the squared errors, shape `(layers, 2)`.
        bits: Bit-widths of the layers, shape `(layers,)`.

    Returns:
        `Prediction`; its noise is unbounded before a layer's third probe.
    """
    sensitivity, standard_error = sensitivity_of(statistics, squared_norms)
    near = tf.logical_and(statistics.weights > 0, tf.abs(bits - statistics.bits) <= REACH)
    noise = tf.math.multiply_no_nan(standard_error[:, None], tf.abs(errors))
    return Prediction(sensitivity[:, None] * errors, noise, near)


def decided(prediction, price_changes, may_fall, may_rise, directions):
    """1 for fewer bits, -1 for more, 0 to stay; a reversal must exceed the noise.

    Args:
        prediction: `Prediction`.
        price_changes: Changes of the price with one bit fewer and one more, shape `(layers, 2)`.
        may_fall: Booleans, whether one bit fewer is allowed, shape `(layers,)`.
        may_rise: Booleans, whether one bit more is allowed, shape `(layers,)`.
        directions: Latest moves, 1 or -1, or 0 if there was none, shape `(layers,)`.

    Returns:
        Float32 tensor of shape `(layers,)`.
    """
    rule = price_changes, may_fall, may_rise
    gradients = adjacent_gradients(prediction.changes, *rule)
    at_worst = adjacent_gradients(prediction.changes + CERTAINTY * prediction.noise, *rule)
    goes_on = gradients * directions >= 0
    return tf.where(tf.logical_or(goes_on, tf.equal(at_worst, gradients)), gradients, 0.0)


def adjacent_gradients(loss_changes, price_changes, may_fall, may_rise):
    """1 where one bit fewer lowers loss plus price, -1 where one more does, else 0.

    Args:
        loss_changes: Changes of the loss with one bit fewer and one more, shape `(layers, 2)`.
        price_changes: Changes of the price with one bit fewer and one more, shape `(layers, 2)`.
        may_fall: Booleans, whether one bit fewer is allowed, shape `(layers,)`.
        may_rise: Booleans, whether one bit more is allowed, shape `(layers,)`.

    Returns:
        Float32 tensor of shape `(layers,)`.

    Examples:
        >>> changes = tf.constant([[0.3, -0.1], [0.1, -0.05], [0.9, -0.3]])
        >>> prices = tf.constant([[-0.2, 0.2]] * 3)
        >>> adjacent_gradients(changes, prices, [True] * 3, [True] * 3).numpy().tolist()
        [0.0, 1.0, -1.0]
    """
    total = loss_changes + price_changes
    allowed = tf.stack([may_fall, may_rise], axis=1)
    gain = tf.where(allowed, tf.maximum(-total, 0.0), 0.0)
    return tf.sign(gain[:, 0] - gain[:, 1])


def sensitivity_of(statistics, squared_norms):
    """Loss per squared error of each layer and its standard error; see `sensitivities`."""
    return sensitivities(*statistics[:4], squared_norms)
