"""The distance of a model's outputs from reference outputs, in units of their variance."""

import keras
import numpy as np
import tensorflow as tf

# Smaller probabilities are replaced by this one before the logarithm is taken.
LEAST_PROBABILITY = 1e-7
# A channel is constant if its variance is at most this share of its mean square, or if more than
# this share of its values are equal.
ROUNDING, MOST_EQUAL = 1e-12, 0.99


class OutputDistance:
    """Mean squared difference of a model's outputs from reference outputs.

    Differences are divided by the variance of each channel (the last axis) over the reference, so
    a model that always returns the mean output has a distance of 1, whatever the unit of the
    outputs. Differences of a constant output are divided by its mean square. Probabilities are
    compared as logits, which are not compressed near 0 and 1. Several outputs have equal weight;
    integer outputs are left out.

    Args:
        reference: Structure of arrays, the outputs of the float model on examples.
        model: The float model, whose layers show which outputs come from a sigmoid; or None.

    Attributes:
        constant: Whether all channels of all outputs are constant, or nearly (`constant_channels`).

    Raises:
        ValueError: There is no float output, or one is not finite.

    Examples:
        >>> distance = OutputDistance(np.array([[1.0], [3.0]]))
        >>> float(distance(np.array([[2.0], [2.0]]), np.array([[1.0], [3.0]])))
        1.0
    """

    def __init__(self, reference, model=None):
        sigmoids = _made_by_sigmoid(model)
        self._heads = []
        self.constant = True
        for number, output in enumerate(keras.tree.flatten(reference)):
            if not tf.as_dtype(output.dtype).is_floating:
                continue
            output = np.asarray(output, "float32")
            if not np.all(np.isfinite(output)):
                raise ValueError(
                    "The outputs of the float model must be finite on the example inputs. "
                    f"Received: NaN or infinity in output {number}, of shape {output.shape}"
                )
            transform = _transform(output, number in sigmoids)
            channels = output.shape[-1] if output.ndim > 1 else 1
            values = transform(tf.constant(output, tf.float32)).numpy().reshape(-1, channels)
            self.constant = self.constant and bool(constant_channels(values).all())
            deviation = np.sqrt(channel_variances(values))
            self._heads.append((number, transform, deviation.astype("float32")))
        if not self._heads:
            raise ValueError("The model must have a float output. Received: integer outputs only")

    def __call__(self, outputs, reference):
        """The distance between two structures of outputs for the same examples, a scalar."""
        outputs, reference = keras.tree.flatten(outputs), keras.tree.flatten(reference)
        distances = [
            tf.reduce_mean(
                tf.square(
                    (
                        transform(tf.cast(outputs[number], tf.float32))
                        - transform(tf.cast(reference[number], tf.float32))
                    )
                    / deviation
                )
            )
            for number, transform, deviation in self._heads
        ]
        return tf.add_n(distances) / len(distances)


def channel_variances(values):
    """The variance of each channel; for constant channels the mean variance of the others.

    The own variance of a constant channel would make its small differences outweigh those of all
    other channels.

    Args:
        values: Float array of shape `(examples, channels)`.

    Returns:
        Float64 array of shape `(channels,)`. If all channels are constant, it is their mean square,
        or 1 if they are zero.

    Examples:
        >>> channel_variances(np.array([[1.0, 2e-6, 5.0], [3.0, 4e-6, 5.0]])).tolist()
        [1.0, 1e-12, 0.5000000000005]
    """
    values, is_constant = values.astype("float64"), constant_channels(values)
    variance = values.var(axis=0)
    if is_constant.all():
        return np.full(len(variance), np.square(values).mean() or 1.0)
    return np.where(is_constant, variance[~is_constant].mean(), variance)


def constant_channels(values):
    """Which channels vary by rounding only, or have nearly always the same value.

    The latter are those of a unit that is hardly ever active.

    Args:
        values: Float array of shape `(examples, channels)`.

    Returns:
        Boolean array of shape `(channels,)`.
    """
    values = values.astype("float64")
    is_rounding = values.var(axis=0) <= ROUNDING * np.square(values).mean(axis=0)
    equal = (values == np.median(values, axis=0)).mean(axis=0)
    return is_rounding | (equal > MOST_EQUAL)


def _transform(output, is_sigmoid):
    """The function that is applied to an output before it is compared."""
    if is_sigmoid:
        return _logits_of_sigmoid
    is_distribution = (
        output.ndim > 1
        and output.shape[-1] > 1
        and output.min() >= 0
        and np.allclose(output.sum(axis=-1), 1, atol=1e-3)
    )
    return _logits_of_softmax if is_distribution else tf.identity


def _logits_of_softmax(probabilities):
    logits = tf.math.log(tf.maximum(probabilities, LEAST_PROBABILITY))
    return logits - tf.reduce_mean(logits, axis=-1, keepdims=True)


def _logits_of_sigmoid(probabilities):
    probabilities = tf.clip_by_value(probabilities, LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
    return tf.math.log(probabilities) - tf.math.log1p(-probabilities)


def _made_by_sigmoid(model):
    """Indices of the outputs that layers with a sigmoid compute, as far as the graph shows."""
    if not isinstance(model, keras.Model) or not getattr(model, "outputs", None):
        return set()
    makers = {}
    for layer in model.layers:
        try:
            makers[id(layer.output)] = layer
        except (AttributeError, ValueError):  # it has several outputs, or none
            continue
    activations = [getattr(makers.get(id(each)), "activation", None) for each in model.outputs]
    return {n for n, each in enumerate(activations) if each is keras.activations.sigmoid}


def agreement(outputs, reference):
    """Share of the examples for which the largest of several outputs is the same.

    Args:
        outputs: Structure of arrays.
        reference: Structure of arrays, for the same examples.

    Returns:
        A number; None if no output is of shape `(examples, ..., classes)` with several classes.
    """
    pairs = zip(keras.tree.flatten(outputs), keras.tree.flatten(reference), strict=True)
    shares = [
        np.mean(np.argmax(a, axis=-1) == np.argmax(b, axis=-1))
        for a, b in pairs
        if np.ndim(b) > 1 and np.shape(b)[-1] > 1
    ]
    return float(np.mean(shares)) if shares else None
