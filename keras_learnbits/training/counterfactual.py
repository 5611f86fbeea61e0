"""The loss of a model on one batch at other bit-widths."""

import inspect

import keras
import tensorflow as tf

from keras_learnbits.layers.compute_scope import flowing_bit_gradients
from keras_learnbits.layers.quantized_tensors import integer_widths
from keras_learnbits.layers.rounding_scope import rounding_once
from keras_learnbits.layers.traversal import layers_inside
from keras_learnbits.training.replicas import unshared


class CounterfactualLosses:
    """Losses of a model on one batch at other bit-widths, without the price of the bits.

    Evaluating them does not change the model: neither weights, nor metrics, nor statistics.

    Args:
        model: A compiled model that learns its bits.
        batch: Tuple `(x, y, sample_weight)`.
        training: Whether to run the model as `fit` does, with batch statistics and with the same
            dropout in all cases; otherwise as `evaluate` does.
        state: List of pairs of a variable and its value during the run, such as `values_before`.
        loss: Result of `compute_loss` at the current bit-widths, which `changes` needs.
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
            shifts: Float32 tensor of shape `(cases, layers)`, integers to add to the bit-widths,
                which are clipped to their bounds.

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
            with scope, rounding_once(), flowing_bit_gradients(False):
                return _mean_loss(run(self.model, self.batch, self.training)[1])

        # A loop in the graph traces the model once for all cases; one at a time, so that only one
        # case's activations are in memory.
        return tf.map_fn(loss_at, shifts, parallel_iterations=1)

    def changes(self, tensors, shifts):
        """Changes of the loss between the current bit-widths and shifted ones.

        Args:
            tensors: List of `QuantizedTensor`s of the model.
            shifts: Float32 tensor of shape `(cases, layers)`, as for `at`.

        Returns:
            Float32 tensor of shape `(cases,)`.
        """
        if self._needs_inference():
            # Estimators call this in a `tf.cond`, inside of which replicas cannot synchronize their
            # batch statistics, so the moving statistics are used. The loss of the training step has
            # batch statistics, so the current bit-widths are evaluated again as the first case.
            losses = CounterfactualLosses(self.model, self.batch, training=False)
            losses = losses.at(tensors, tf.pad(shifts, [[1, 0], [0, 0]]))
            return losses[1:] - losses[0]
        return self.at(tensors, shifts) - _mean_loss(self.loss)

    def _needs_inference(self):
        """Whether a batch normalization synchronizes its statistics between replicas."""
        layers = layers_inside(self.model)
        return tf.distribute.has_strategy() and any(
            getattr(layer, "synchronized", False) for layer in layers
        )


def run(model, batch, training):
    """Predictions of a model and their loss.

    `call` and `compute_loss` of custom classes need not have an argument `training`.

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
    """`training` as a dictionary of keyword arguments; empty if a function does not take it."""
    return {"training": training} if "training" in inspect.signature(function).parameters else {}


def values_before(model):
    """Pairs of each variable that a forward pass may change, e.g. a seed, and its value."""
    return [(v, tf.convert_to_tensor(v.value)) for v in model.non_trainable_variables]


def without_side_effects(model, state=()):
    """A scope in which a model's variables do not change, and some have other values.

    Args:
        model: A Keras model.
        state: List of pairs of a variable and its value in the scope.
    """
    # keras/src/layers/layer.py, `_get_regularization_losses`, reads regularized weights from the
    # scope and fails on those that the scope does not have.
    regularized = [v for v in model.trainable_variables if v.regularizer is not None]
    state = [(v, v.value) for v in regularized] + list(state)
    return keras.StatelessScope(state_mapping=state, collect_losses=True)


def _mean_loss(loss):
    """The mean over this replica's examples in float32, from the result of `compute_loss`."""
    return tf.cast(unshared(loss), tf.float32)
