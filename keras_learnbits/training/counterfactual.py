"""The loss of a model on one batch at other bit-widths."""

import inspect

import keras
import tensorflow as tf

from keras_learnbits.layers.compute_scope import bit_gradients
from keras_learnbits.layers.quantized_tensors import integer_widths
from keras_learnbits.layers.rounding_scope import rounding_once
from keras_learnbits.layers.traversal import layers_inside
from keras_learnbits.training.replicas import unshared


class CounterfactualLosses:
    """Losses of a model on one batch at other bit-widths, without the price of the bits.

    Nothing in the model changes: neither weights, nor metrics, nor statistics.

    Args:
        model: A compiled model that learns its bits.
        batch: Tuple `(x, y, sample_weight)`.
        training: Whether to run the model as `fit` does, with batch statistics and with the same
            dropout in all cases; otherwise as `evaluate` does.
        state: List of pairs of a variable and the value to run it with, such as `values_before`.
        loss: Result of `compute_loss` at the present bit-widths, if it is known already.
    """

    def __init__(self, model, batch, training=True, state=(), loss=None):
        self.model = model
        self.batch = batch
        self.training = training
        self.state = list(state)
        self.loss = loss

    def at(self, tensors, shifts):
        """Losses at shifted bit-widths.

        Args:
            tensors: List of `QuantizedTensor`s of the model.
            shifts: Integers to add to their bit-widths, which stay within their bounds; shape
                `(cases, layers)`.

        Returns:
            Float32 tensor of shape `(cases,)`.
        """
        bits = integer_widths(tensors)
        low = [float(tensor.layer.min_bits) for tensor in tensors]
        high = [float(tensor.layer.max_bits) for tensor in tensors]

        def loss_at(shift):
            widths = tf.unstack(tf.clip_by_value(bits + shift, low, high))
            shifted = [(tensor.bits, width) for tensor, width in zip(tensors, widths, strict=True)]
            scope = without_side_effects(self.model, [*self.state, *shifted])
            with scope, rounding_once(), bit_gradients(False):
                return _mean_loss(run(self.model, self.batch, self.training)[1])

        return tf.map_fn(loss_at, shifts, parallel_iterations=1)

    def changes(self, tensors, shifts):
        """Changes of the loss from the present bit-widths to shifted ones.

        Args:
            tensors: List of `QuantizedTensor`s of the model.
            shifts: As for `at`.

        Returns:
            Float32 tensor of shape `(cases,)`.
        """
        if self.loss is None or self._needs_inference():
            # Replicas cannot synchronize in a branch of the graph: run without batch statistics.
            training = self.training and not self._needs_inference()
            losses = CounterfactualLosses(self.model, self.batch, training)
            losses = losses.at(tensors, tf.pad(shifts, [[1, 0], [0, 0]]))
            return losses[1:] - losses[0]
        return self.at(tensors, shifts) - _mean_loss(self.loss)

    def _needs_inference(self):
        """Whether replicas synchronize the statistics of a batch normalization."""
        layers = layers_inside(self.model)
        return tf.distribute.has_strategy() and any(
            getattr(layer, "synchronized", False) for layer in layers
        )


def run(model, batch, training):
    """Predictions of a model and their loss. Subclasses may leave `training` out of both.

    Args:
        model: A compiled model.
        batch: Tuple `(x, y, sample_weight)`.
        training: Boolean.

    Returns:
        Tuple of predictions and the result of `compute_loss`.
    """
    x, y, sample_weight = batch
    y_pred = model(x, **training_argument(model.call, training))
    more = training_argument(model.compute_loss, training)
    return y_pred, model.compute_loss(x, y, y_pred, sample_weight, **more)


def training_argument(function, training):
    """`training` as a keyword argument, if a function takes it."""
    return {"training": training} if "training" in inspect.signature(function).parameters else {}


def values_before(model):
    """Pairs of a variable that a forward pass may change, such as a seed, and its value."""
    return [(v, tf.convert_to_tensor(v.value)) for v in model.non_trainable_variables]


def without_side_effects(model, state=()):
    """A scope in which variables of a model are not changed, and some have other values.

    Args:
        model: A Keras model.
        state: List of pairs of a variable and its value in the scope.
    """
    # `model.losses` reads regularized weights from the scope, and fails on those that are missing.
    regularized = [v for v in model.trainable_variables if v.regularizer is not None]
    state = [(v, v.value) for v in regularized] + list(state)
    return keras.StatelessScope(state_mapping=state, collect_losses=True)


def _mean_loss(loss):
    """The mean over this replica's examples in float32, from the result of `compute_loss`."""
    return tf.cast(unshared(loss), tf.float32)
