"""Base class of the estimators that compare adjacent integer bit-widths."""

import numpy as np
import tensorflow as tf

from keras_learnbits.estimators.base import BitGradient
from keras_learnbits.estimators.sensitivity import (
    look_variances,
    over_directions,
    sensitivities,
    updated,
)
from keras_learnbits.layers.quantized_tensors import integer_widths
from keras_learnbits.numerics import grids

# Standard errors by which a layer must gain before it turns around.
CERTAINTY = 2
# Bits by which a sensitivity may be carried on from the width of the latest look.
REACH = 1
# Loss per weight and squared step that more bits gain in any case, so that budgets are used up.
TRACE = 1e-12


class WholeBit(BitGradient):
    """Base class of the estimators that compare with a whole bit fewer and a whole bit more.

    Every `interval` steps they look at some layers: at the change of the loss with one bit fewer
    or with one more, and at the change of the squared quantization error, which is exact. Means
    over the latest looks give what a layer has shown of its *sensitivity* `s`, the loss per squared
    error; it is weighed by its noise with what the others have shown
    (`keras_learnbits.sensitivity`). The predicted change of the loss is `s` times the present
    change of the error. Each layer moves where that plus the change of the price is negative,

        fewer bits   if  cost = loss(B - 1) - loss(B)  <  price(B) - price(B - 1)
        more bits    if  worth = loss(B) - loss(B + 1)  >  price(B + 1) - price(B)

    where the gain is greater if in both, and else its gradient is 0: the bits stay. A layer that
    has moved the other way before turns only where it gains two standard errors more of what its
    looks show, which their spread estimates; so noise alone rarely turns a layer. No layer moves
    more than two bits from one look to the next, since what a look could not see grows fourfold
    with each bit. At fixed weights and sensitivities this ends where no single bit's change
    improves the sum.

    Args:
        interval: Training steps from one look to the next, an integer >= 1.

    Raises:
        ValueError: `interval` is no integer, or below 1.
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
        of_layers = (len(tensors),)

        # Replicas see other examples: what is assigned is averaged over them.
        def add(name, shape=of_layers):
            return add_variable(shape, dtype="float32", aggregation="mean", name=name)

        self.steps = add("bit_steps", ())
        self.loss_changes = add("loss_changes")
        self.error_changes = add("error_changes")
        self.variances = add("loss_change_variances")
        self.looked_at = add("looked_at")
        self.seen_at = add("seen_at")
        self.directions = add("directions")
        self.gradients = add("bit_gradients")
        self.widths = add("decided_at")

    def __call__(self, step):
        if not movable(step.tensors):
            return tf.zeros(len(step.tensors))
        # Of the layers there were at the start, some may have been frozen since.
        places = [self.tensors.index(tensor) for tensor in step.tensors]
        due = tf.logical_and(tf.equal(self.steps % self.interval, 0.0), step.bits_move)
        # Here, where the step has rounded all kernels, they cost nothing.
        errors = [tensor.squared_error() for tensor in step.tensors]
        changes, seen, errors = tf.cond(
            due, lambda: self._look(step, errors), lambda: self._no_look(len(places))
        )
        # Variables are assigned outside of `tf.cond`, where replicas cannot meet.
        predicted, noise, known = self._learn(places, changes, errors, seen)
        gradients = tf.where(known, self._decide(places, step, predicted, noise), 0.0)
        bits = integer_widths(step.tensors)
        moved = tf.logical_and(due, gradients != 0)
        for variable, new, where in (
            (self.gradients, gradients, due),
            (self.widths, bits, due),
            (self.directions, gradients, moved),
        ):
            self._put(variable, places, tf.where(where, new, tf.gather(variable.value, places)))
        self.steps.assign_add(tf.cast(step.bits_move, tf.float32))
        # A decision holds for the width that it was made at.
        holds = tf.equal(tf.gather(self.widths.value, places), bits)
        return tf.where(holds, tf.gather(self.gradients.value, places), 0.0)

    def _learn(self, places, changes, errors, seen):
        """Takes a look into the running means.

        Returns:
            The predicted change of the loss in each direction, shape `(layers, 2)`; the standard
            error of what looks show of it, boundless before the third; and for which layers it is
            known, shape `(layers,)`: those that were looked at near their present width.
        """

        def update(variable, new, where):
            old = tf.gather(variable.value, places)
            self._put(variable, places, tf.where(where, updated(old, new), old))
            return tf.gather(variable.value, places)

        looked = tf.reduce_any(seen, axis=1)
        known = tf.gather(self.looked_at.value, places) > 0
        loss_change, error_change = over_directions(changes, tf.where(seen, errors, 0.0))
        before = (tf.gather(v.value, places) for v in (self.loss_changes, self.error_changes))
        variance = look_variances(loss_change, error_change, *before)
        update(self.variances, variance, tf.logical_and(looked, known))
        update(self.loss_changes, loss_change, looked)
        update(self.error_changes, error_change, looked)
        looked_at = update(self.looked_at, tf.ones_like(places, tf.float32), looked)
        bits = integer_widths([self.tensors[place] for place in places])
        seen_at = tf.where(looked, bits, tf.gather(self.seen_at.value, places))
        self._put(self.seen_at, places, seen_at)
        near = tf.logical_and(looked_at > 0, tf.abs(bits - seen_at) <= REACH)
        sensitivity, standard_error = self._sensitivities(places)
        noise = tf.math.multiply_no_nan(standard_error[:, None], tf.abs(errors))
        return sensitivity[:, None] * errors, noise, near

    def _sensitivities(self, places):
        """Loss per squared error of some layers, and its standard error."""
        means = self.loss_changes, self.error_changes, self.variances, self.looked_at
        energies = tf.stack([self.tensors[place].energy() for place in places])
        return sensitivities(*(tf.gather(mean.value, places) for mean in means), energies)

    def _decide(self, places, step, predicted, noise):
        """-1, 0 or 1 for each layer."""
        rule = step.price_changes, *room(step.tensors)
        gradients = whole_bit_gradients(predicted, *rule)
        certain = tf.equal(whole_bit_gradients(predicted + CERTAINTY * noise, *rule), gradients)
        directions = tf.gather(self.directions.value, places)
        return tf.where(tf.logical_or(gradients * directions >= 0, certain), gradients, 0.0)

    def _put(self, variable, places, rows):
        """Assigns some rows of a variable."""
        at = tf.constant(places)[:, None]
        variable.assign(tf.tensor_scatter_nd_update(variable.value, at, rows))

    def _look(self, step, errors):
        errors = error_changes(step.tensors, errors)
        changes, seen = self.look(step, errors)
        usable = tf.logical_and(seen, tf.math.is_finite(changes))
        return tf.where(usable, changes, 0.0), usable, errors

    def _no_look(self, layers):
        return tf.zeros((layers, 2)), tf.zeros((layers, 2), tf.bool), tf.zeros((layers, 2))

    def look(self, step, errors):
        """Changes of the loss with one bit fewer and one more, and which of them were seen.

        Args:
            step: `BitStep`.
            errors: Changes of the squared errors, shape `(layers, 2)`.

        Returns:
            Float32 and boolean tensor of shape `(layers, 2)`.
        """
        raise NotImplementedError

    def predict(self, step):
        return self.look(step, error_changes(step.tensors))[0]

    def has_seen_all(self):
        """Whether every trained layer was looked at, so that no prediction is a guess."""
        looked_at = tf.convert_to_tensor(self.looked_at.value).numpy()
        return all(
            looked_at[place] for place in movable(self.tensors) if self.tensors[place].trainable
        )

    def loss_table(self):
        """Predicted loss of each layer at each bit-width, others as they are.

        Returns:
            NumPy array of shape `(layers, 16)`: the loss at 1, 2, ... bits, relative to that at
            the present width; `inf` beyond a layer's bounds. More bits never cost more: where
            the prediction is flat, they gain a trace of relative error.
        """
        sensitivity = self._sensitivities(range(len(self.tensors)))[0].numpy()
        rows = list(map(_loss_row, self.tensors, sensitivity))
        return np.reshape(rows, (len(rows), grids.MAX_BITS))

    def get_config(self):
        return {"interval": self.interval}


def _neighbours(tensors):
    """The bit-widths one below and one above, within what grids allow, shape `(2, layers)`."""
    bits = integer_widths(tensors)
    return tf.stack([tf.maximum(bits - 1, grids.MIN_BITS), tf.minimum(bits + 1, grids.MAX_BITS)])


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


def error_changes(tensors, errors=None):
    """Changes of `||q - W||^2` with one bit fewer and with one more.

    Args:
        tensors: List of `QuantizedTensor`.
        errors: Their squared errors, where they are known.

    Returns:
        Float32 tensor of shape `(layers, 2)`.
    """

    def errors_at(widths):
        widths = tf.unstack(widths, num=len(tensors))
        return tf.stack([t.squared_error_at(b) for t, b in zip(tensors, widths, strict=True)])

    errors = tf.stack(errors or [tensor.squared_error() for tensor in tensors])
    # A loop, so that it is traced once.
    widths = _neighbours(tensors)
    changed = tf.map_fn(errors_at, widths, parallel_iterations=1) - errors
    # Where there is no neighbour, exactly 0, however the two were compiled.
    changed = tf.where(tf.equal(widths, integer_widths(tensors)), 0.0, changed)
    return tf.stop_gradient(tf.transpose(changed))


def movable(tensors):
    """Places of the layers whose bounds leave them more than one width."""
    bounds = [(tensor.layer.min_bits, tensor.layer.max_bits) for tensor in tensors]
    return [place for place, (low, high) in enumerate(bounds) if low < high]


def room(tensors):
    """Whether each layer may take a bit fewer, and a bit more: two tensors `(layers,)`."""
    bits = integer_widths(tensors)
    low = tf.constant([float(tensor.layer.min_bits) for tensor in tensors])
    high = tf.constant([float(tensor.layer.max_bits) for tensor in tensors])
    return bits > low, bits < high


def whole_bit_gradients(loss_changes, price_changes, may_fall, may_rise):
    """1 where one bit fewer lowers loss plus price, -1 where one more does, else 0.

    Args:
        loss_changes: With one bit fewer and one more, shape `(layers, 2)`.
        price_changes: Likewise.
        may_fall: Where one bit fewer is allowed, shape `(layers,)`.
        may_rise: Where one bit more is.

    Returns:
        Float32 tensor of shape `(layers,)`.

    Examples:
        >>> changes = tf.constant([[0.3, -0.1], [0.1, -0.05], [0.9, -0.3]])
        >>> prices = tf.constant([[-0.2, 0.2]] * 3)
        >>> whole_bit_gradients(changes, prices, [True] * 3, [True] * 3).numpy().tolist()
        [0.0, 1.0, -1.0]
    """
    total = loss_changes + price_changes
    allowed = tf.stack([may_fall, may_rise], axis=1)
    gain = tf.where(allowed, tf.maximum(-total, 0.0), 0.0)
    return tf.sign(gain[:, 0] - gain[:, 1])
