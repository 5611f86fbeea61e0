"""`CounterfactualLosses`: what a batch's loss would be at other bit-widths."""

import inspect

import keras
import tensorflow as tf

from keras_learnbits.layers.quantized_tensors import integer_widths
from keras_learnbits.layers.rounding_scope import rounding_once
from keras_learnbits.layers.traversal import layers_inside
from keras_learnbits.training.replicas import unshared


class CounterfactualLosses:
    """Runs a model once more at other bit-widths; goes before the Keras class.

    Nothing changes: neither weights, nor metrics, nor statistics.
    """

    def losses_at(self, data, shifts, training, state=()):
        """Losses on a batch with other bit-widths.

        Args:
            data: Tuple `(x, y, sample_weight)`.
            shifts: Integers to add to the widths of `trained_tensors`, which stay within their
                bounds; shape `(cases, layers)`.
            training: Whether to run the model as `fit` does, with batch statistics and dropout,
                the same in all cases; otherwise as `evaluate` does.
            state: Pairs of a variable and a value to run it with.

        Returns:
            Float32 tensor of shape `(cases,)`: losses without the price.
        """
        moving = self.trained_tensors
        bits = integer_widths(moving)
        low = [float(tensor.layer.min_bits) for tensor in moving]
        high = [float(tensor.layer.max_bits) for tensor in moving]

        def loss_at(shift):
            widths = tf.unstack(tf.clip_by_value(bits + shift, low, high))
            shifted = [(tensor.bits, width) for tensor, width in zip(moving, widths, strict=True)]
            with self._changing_nothing([*state, *shifted]), rounding_once():
                return _of_replica(self._call_and_compare(*data, training)[1])

        return tf.map_fn(loss_at, shifts, parallel_iterations=1)

    def _loss_changes(self, data, shifts, loss, state):
        """`BitStep.loss_changes`, from this step's loss and the `_state_before` it."""
        synchronized = any(getattr(each, "synchronized", False) for each in layers_inside(self))
        if synchronized and tf.distribute.has_strategy():
            # Replicas cannot meet in a branch of the graph: as `evaluate` runs the model.
            losses = self.losses_at(data, tf.pad(shifts, [[1, 0], [0, 0]]), training=False)
            return losses[1:] - losses[0]
        losses = self.losses_at(data, shifts, training=True, state=state)
        return losses - _of_replica(loss)

    def _call_and_compare(self, x, y, sample_weight, training):
        """Predictions and their loss. Subclasses may leave out the argument `training` of both."""
        y_pred = self(x, **training_argument(self.call, training))
        more = training_argument(self.compute_loss, training)
        return y_pred, self.compute_loss(x, y, y_pred, sample_weight, **more)

    def _state_before(self):
        """What a pass may change, as seeds of dropout: pairs of a variable and its value."""
        return [(v, tf.convert_to_tensor(v.value)) for v in self.non_trainable_variables]

    def _changing_nothing(self, state=()):
        """A scope that keeps what a pass would change, with some variables at other values."""
        # Keras reads regularized weights from the scope.
        regularized = [v for v in self.trainable_variables if v.regularizer is not None]
        state = [(v, v.value) for v in regularized] + list(state)
        return keras.StatelessScope(state_mapping=state, collect_losses=True)


def training_argument(function, training):
    """`training` as a keyword argument, where a function takes it."""
    return {"training": training} if "training" in inspect.signature(function).parameters else {}


def _of_replica(loss):
    """The mean loss of this replica's examples in float32, from what `compute_loss` returned."""
    return tf.cast(unshared(loss), tf.float32)
