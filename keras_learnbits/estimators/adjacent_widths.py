"""Base class of the estimators that compare adjacent integer bit-widths."""

import numpy as np
import tensorflow as tf

from keras_learnbits.estimators.base import BitGradient
from keras_learnbits.estimators.decisions import (
    Decision,
    Statistics,
    decided,
    learned,
    predicted,
    sensitivity_of,
)
from keras_learnbits.layers.quantized_tensors import integer_widths
from keras_learnbits.numerics import grids

# Every further bit is credited with at least this tiny gain, in loss per weight and squared step,
# so that an allocation spends the whole budget.
TRACE = 1e-12


class AdjacentWidths(BitGradient):
    """Base class of the estimators that decide between one bit fewer, one more, and neither.

    Every `interval` steps they probe some layers: they measure the change of the loss with fewer
    bits or with more. The change of the squared quantization error is computed exactly. Means
    over the latest probes estimate each layer's *sensitivity* `s`, the loss per squared error,
    which is shrunk towards the mean of all layers according to its noise
    (`keras_learnbits.estimators.sensitivity`). The predicted change of the loss is `s` times the
    present change of the error. Each layer moves where that plus the change of the price is
    negative,

        fewer bits   if  cost = loss(B - 1) - loss(B)  <  price(B) - price(B - 1)
        more bits    if  worth = loss(B) - loss(B + 1)  >  price(B + 1) - price(B)

    in the direction with the greater gain; otherwise its gradient is 0 and its bits stay. A layer
    reverses direction only if the gain exceeds 0 by two standard errors of what its probes show,
    so noise alone rarely does it. Between two probes a layer moves at most two bits, because what
    rounding adds grows about fourfold per bit. At fixed weights and sensitivities this ends
    where no change by a single bit lowers the sum of loss and price.

    A subclass defines `probe`.

    Args:
        interval: Training steps from one probe to the next, an integer >= 1.

    Raises:
        ValueError: `interval` is not an integer, or is below 1.
    """

    predicts_losses = True
    takes_bit_gradients = False

    def __init__(self, interval=20):
        if not isinstance(interval, int) or interval < 1:
            raise ValueError(
                f"`interval` must be an integer number of steps >= 1. Received: interval={interval}"
            )
        self.interval = interval

    def build(self, tensors, add_variable):
        self.tensors = tensors

        # Replicas see different examples: assignments average over replicas.
        shape_of_rows = (len(tensors),)

        def add(name, shape=shape_of_rows):
            return add_variable(shape, dtype="float32", aggregation="mean", name=name)

        # Files list these variables in this order.
        self.steps = add("bit_steps", ())
        self.statistics = _Rows(Statistics, add)
        self.decisions = _Rows(Decision, add)

    def probe(self, step, errors):
        """Changes of the loss with fewer bits and with more, and which of them were measured.

        Args:
            step: `BitStep`.
            errors: Changes of the squared errors at these widths, shape `(layers, 2)`.

        Returns:
            Float32 and boolean tensor of shape `(layers, 2)`.
        """
        raise NotImplementedError

    def lower_widths(self, tensors):
        """Widths at which `probe` measures with fewer bits, shape `(layers,)`; None for one fewer.

        A subclass that overrides it also overrides `predict`, which is about one bit fewer.

        Args:
            tensors: List of `QuantizedTensor`.
        """
        return None

    def __call__(self, step):
        if not movable(step.tensors):
            return tf.zeros(len(step.tensors))
        # Some of the layers that `build` received may have been made untrainable since.
        indices = [self.tensors.index(tensor) for tensor in step.tensors]
        due = tf.logical_and(tf.equal(self.steps % self.interval, 0.0), step.bits_move)
        # Computed outside of the branch, where the step has rounded all kernels already.
        errors = [tensor.squared_error() for tensor in step.tensors]
        changes, measured, errors, probed_errors = tf.cond(
            due, lambda: self._probed(step, errors), lambda: _not_probed(len(indices))
        )
        bits = integer_widths(step.tensors)
        # Variables are assigned outside of `tf.cond`: replicas cannot synchronize in a branch.
        statistics = learned(self.statistics.read(indices), changes, probed_errors, measured, bits)
        statistics = self.statistics.write(indices, statistics)
        prediction = predicted(statistics, squared_norms(step.tensors), errors, bits)
        old = self.decisions.read(indices)
        rule = step.price_changes, *allowed_moves(step.tensors)
        gradients = tf.where(prediction.known, decided(prediction, *rule, old.directions), 0.0)
        moves = tf.logical_and(due, gradients != 0)
        decision = self.decisions.write(
            indices,
            Decision(
                directions=tf.where(moves, gradients, old.directions),
                gradients=tf.where(due, gradients, old.gradients),
                bits=tf.where(due, bits, old.bits),
            ),
        )
        self.steps.assign_add(tf.cast(step.bits_move, tf.float32))
        # A decision is valid only at the width at which it was made.
        return tf.where(tf.equal(decision.bits, bits), decision.gradients, 0.0)

    def _probed(self, step, errors):
        widths, lower = adjacent_widths(step.tensors), self.lower_widths(step.tensors)
        widths = widths if lower is None else tf.concat([widths, lower[None]], axis=0)
        errors = error_changes(step.tensors, errors, widths)
        adjacent = errors[:, :2]
        probed = adjacent if lower is None else tf.stack([errors[:, 2], errors[:, 1]], axis=1)
        changes, measured = self.probe(step, probed)
        usable = tf.logical_and(measured, tf.math.is_finite(changes))
        return tf.where(usable, changes, 0.0), usable, adjacent, probed

    def predict(self, step):
        return self.probe(step, error_changes(step.tensors))[0]

    def has_probed_all(self):
        """Whether every trained layer was probed, so that `loss_table` rests on measurements."""
        weights = tf.convert_to_tensor(self.statistics.variables.weights.value).numpy()
        return all(
            weights[index] for index in movable(self.tensors) if self.tensors[index].trainable
        )

    def loss_table(self):
        """Predicts the loss of each layer at each bit-width, with all other layers unchanged.

        Returns:
            NumPy array of shape `(layers, 16)`: the loss at 1, 2, ... bits, relative to that at
            the present width; `inf` beyond a layer's bounds. The loss never rises with the bits:
            where the prediction is flat, a further bit still lowers it by a tiny amount.
        """
        statistics = self.statistics.read(range(len(self.tensors)))
        sensitivity, _ = sensitivity_of(statistics, squared_norms(self.tensors))
        rows = list(map(_loss_row, self.tensors, sensitivity.numpy()))
        return np.reshape(rows, (len(rows), grids.MAX_BITS))

    def get_config(self):
        return {"interval": self.interval}


class _Rows:
    """Variables that hold one row per layer for each field of a `NamedTuple`.

    Args:
        kind: The class of the tuple.
        add: Function from a name to a new variable.
    """

    def __init__(self, kind, add):
        self.kind = kind
        self.variables = kind(*map(add, kind._fields))

    def read(self, indices):
        """The rows of some layers, a tuple of tensors."""
        return self.kind(*(tf.gather(v.value, indices) for v in self.variables))

    def write(self, indices, rows):
        """Assigns the rows of some layers, and reads them: the mean over replicas."""
        at = tf.constant(indices)[:, None]
        for variable, new in zip(self.variables, rows, strict=True):
            variable.assign(tf.tensor_scatter_nd_update(variable.value, at, new))
        return self.read(indices)


def error_changes(tensors, errors=None, widths=None):
    """Changes of `||q - W||^2` at other widths, by default with one bit fewer and with one more.

    Args:
        tensors: List of `QuantizedTensor`.
        errors: List of their squared errors, or None to compute them.
        widths: Float32 tensor of shape `(widths, layers)`, or None for `adjacent_widths`.

    Returns:
        Float32 tensor of shape `(layers, widths)`.
    """

    def errors_at(widths):
        widths = tf.unstack(widths, num=len(tensors))
        return tf.stack([t.squared_error_at(b) for t, b in zip(tensors, widths, strict=True)])

    errors = tf.stack(errors or [tensor.squared_error() for tensor in tensors])
    # TensorFlow traces the body of a loop once.
    widths = adjacent_widths(tensors) if widths is None else widths
    changed = tf.map_fn(errors_at, widths, parallel_iterations=1) - errors
    # Exactly 0 where there is no other width, however the two errors were compiled.
    changed = tf.where(tf.equal(widths, integer_widths(tensors)), 0.0, changed)
    return tf.stop_gradient(tf.transpose(changed))


def adjacent_widths(tensors):
    """The bit-widths one below and one above, within 1 and 16 bits, shape `(2, layers)`."""
    bits = integer_widths(tensors)
    return tf.stack([tf.maximum(bits - 1, grids.MIN_BITS), tf.minimum(bits + 1, grids.MAX_BITS)])


def squared_norms(tensors):
    """`||W||^2` of each of a list of `QuantizedTensor`s, shape `(layers,)`."""
    return tf.stack([tensor.squared_norm() for tensor in tensors])


def movable(tensors):
    """Indices of the tensors whose bounds permit more than one bit-width."""
    bounds = [(tensor.layer.min_bits, tensor.layer.max_bits) for tensor in tensors]
    return [index for index, (low, high) in enumerate(bounds) if low < high]


def allowed_moves(tensors):
    """Whether bounds permit one bit fewer, and one more: two tensors of shape `(layers,)`."""
    bits = integer_widths(tensors)
    low = tf.constant([float(tensor.layer.min_bits) for tensor in tensors])
    high = tf.constant([float(tensor.layer.max_bits) for tensor in tensors])
    return bits > low, bits < high


def _not_probed(layers):
    nothing = tf.zeros((layers, 2))
    return nothing, tf.zeros((layers, 2), tf.bool), nothing, nothing


def _loss_row(tensor, sensitivity):
    """One row of `loss_table`, from a layer's sensitivity."""
    low, high, bits = tensor.layer.min_bits, tensor.layer.max_bits, int(tensor.integer_bits())
    widths = np.arange(low, high + 1)
    errors = np.array([float(tensor.squared_error_at(tf.constant(b, tf.float32))) for b in widths])
    losses = sensitivity * (errors - errors[bits - low])
    trace = TRACE * tensor.size * np.take(grids.GAUSSIAN_STEPS, widths - 1) ** 2
    row = np.full(grids.MAX_BITS, np.inf)
    row[low - 1 : high] = np.minimum.accumulate(losses) + trace
    return row
