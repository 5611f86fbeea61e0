"""`probe_bits`: measures how one bit more or fewer changes the loss."""

from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_learnbits import bit_gradients
from keras_learnbits.estimators.adjacent_widths import allowed_moves
from keras_learnbits.estimators.decisions import adjacent_gradients
from keras_learnbits.layers.discovery import activations_among, unique_names
from keras_learnbits.tables import aligned_table
from keras_learnbits.training.fitting import check_learns_bits

MOVES = {-1: "fewer", 0: "stay", 1: "more"}
# Lines that explain the columns of a printed table.
LEGEND = """\
loss: measured change of the loss; +-: its standard error; price: change of bit_reg * penalty
other columns: change of the loss that each estimator predicts; move: what lowers loss + price"""


class BitChange(NamedTuple):
    """One layer with one bit fewer or one more, all else fixed.

    Attributes:
        layer: Name of the layer.
        bits: Integer bit-width of the layer.
        step: -1 for one bit fewer, 1 for one more.
        measured: Change of the mean loss without the price.
        standard_error: Standard error of `measured`, from the paired differences of the batches.
        price: Change of `bit_reg * bit_penalty`.
        predicted: Dictionary of estimator to the change of the loss that it predicts.
    """

    layer: str
    bits: int
    step: int
    measured: float
    standard_error: float
    price: float
    predicted: dict


class BitProbe:
    """The result of `probe_bits`; prints as an aligned table.

    Attributes:
        changes: List of `BitChange`, two per layer unless its bounds exclude one.
        moves: Dictionary of layer to a dictionary of estimator to the move of the layer's bits, -1,
            0 or 1, that lowers the predicted loss plus price; `"loss"` stands for the measured
            loss.
    """

    def __init__(self, changes, moves):
        self.changes = changes
        self.moves = moves

    def __str__(self):
        if not self.changes:
            return "No layer can have one bit more or fewer within its bounds."
        estimators = list(self.changes[0].predicted)
        head = ("layer", "bits", "loss", "+-", "price", *estimators)
        changes = [
            (
                change.layer,
                f"{change.bits} -> {change.bits + change.step}",
                f"{change.measured:+.1e}",
                f"{change.standard_error:.0e}",
                f"{change.price:+.1e}",
                *(f"{change.predicted[name]:+.1e}" for name in estimators),
            )
            for change in self.changes
        ]
        moves = [
            (layer, "move", MOVES[taken["loss"]], "", "", *(MOVES[taken[n]] for n in estimators))
            for layer, taken in self.moves.items()
        ]
        return f"{aligned_table([[head], changes, moves], left=2)}\n{LEGEND}"

    __repr__ = __str__


def probe_bits(model, x, y=None, *, estimate_on=None, batch_size=256, layers=None, training=True):
    """Measures the loss with one bit fewer and one more, layer by layer, all else fixed.

    The result also has the prediction of each estimator of bit gradients, and the move that
    follows from it at the current price. The model does not change.

    Args:
        model: A compiled `LearnedBitModel` or `LearnedBitSequential`.
        x: Inputs, or a finite dataset of batches `(x, y)` or `(x, y, sample_weight)`.
        y: Targets; None for a dataset.
        estimate_on: Data for the estimators, a tuple `(x, y)` or a dataset. By default the same
            data, for which the predictions of `measured` are exact; give a few batches of training
            data for a fair comparison.
        batch_size: Number of examples per batch, for arrays.
        layers: Names of the layers to probe, as in `bit_table`, or one name; all by default.
        training: Whether to measure the loss that `fit` minimizes, with dropout and with batch
            normalization by batch statistics, as the estimator `measured` does. Otherwise it is
            the loss of `evaluate`, whose moving statistics belong to the current bit-widths. That
            mismatch then adds to the loss, although training after the change would remove it.

    Returns:
        `BitProbe`: print it, or read `.changes` and `.moves`.

    Raises:
        TypeError: The model does not learn bits.
        ValueError: A name in `layers` is unknown, the model is not built, or arrays come without
            targets.

    Examples:
        >>> model = keras_learnbits.LearnedBitSequential(
        ...     [keras.Input((8,)), keras_learnbits.LearnedBitDense(4, bits=3, name="dense")])
        >>> model.compile("adam", "mse")
        >>> probe = probe_bits(model, np.ones((64, 8)), np.ones((64, 4)))
        >>> [(change.layer, change.bits, change.step) for change in probe.changes]
        [('dense', 3, -1), ('dense', 3, 1)]
    """
    return BitProber(model, layers, batch_size, training=training)(x, y, estimate_on=estimate_on)


class BitProber:
    """`probe_bits` for repeated use, which traces its functions once.

    Args:
        model: A compiled `LearnedBitModel` or `LearnedBitSequential`.
        layers: Names of the layers to probe, as in `bit_table`, or one name; all by default.
        batch_size: Number of examples per batch, for arrays.
        estimators: Dictionary of name to `keras_learnbits.bit_gradients.BitGradient`; by default
            all estimators of the library that support the model's layers.
        training: Whether to measure the loss that `fit` minimizes; otherwise that of `evaluate`.

    Examples:
        >>> model = keras_learnbits.LearnedBitSequential(
        ...     [keras.Input((8,)), keras_learnbits.LearnedBitDense(4, bits=3, name="dense")])
        >>> model.compile("adam", "mse")
        >>> prober = BitProber(model)
        >>> prober(np.ones((64, 8)), np.ones((64, 4))).changes[0].bits
        3
    """

    def __init__(self, model, layers=None, batch_size=256, estimators=None, training=True):
        check_learns_bits(model, "probe_bits")
        model.prepare_bits()
        tensors = model.trained_tensors
        names = unique_names(tensors)
        layers = [layers] if isinstance(layers, str) else layers
        unknown = set(layers or ()) - set(names)
        if unknown:
            raise ValueError(f"`layers` must be among {names}. Received: {sorted(unknown)}")
        indices = [i for i, name in enumerate(names) if layers is None or name in layers]
        self.names = [names[index] for index in indices]
        self.tensors = [tensors[index] for index in indices]
        self.batch_size = batch_size
        if estimators is None:
            activations = activations_among(self.tensors)
            estimators = {
                name: estimator()
                for name, estimator in bit_gradients.BIT_GRADIENTS.items()
                if not (activations and estimator.kernels_only)
            }

        @tf.function(reduce_retracing=True, autograph=False)
        def measure(batch):
            # One case for the current widths, then each layer one bit lower, then one bit higher.
            shifts = tf.one_hot(indices, len(tensors))
            cases = tf.concat([tf.zeros((1, len(tensors))), -shifts, shifts], axis=0)
            losses = model.losses_at(batch, cases, training)
            return tf.transpose(tf.reshape(losses[1:] - losses[0], (2, len(indices))))

        @tf.function(reduce_retracing=True, autograph=False)
        def predict(batch):
            step = model.bit_step(batch).for_tensors(self.tensors)
            predictions = {name: estimator.predict(step) for name, estimator in estimators.items()}
            return predictions, step.price_changes

        self._measure, self._predict = measure, predict

    def __call__(self, x, y=None, *, estimate_on=None):
        """The result of `probe_bits` for the current state of the model."""
        if not self.tensors:
            return BitProbe([], {})
        data = _batches(x, y, self.batch_size)
        seen = (
            data
            if estimate_on is None
            else _batches(*_inputs_and_targets(estimate_on), self.batch_size)
        )
        losses, errors = _mean([self._measure(batch).numpy() for batch in data], data)
        found = [self._predict(batch) for batch in seen]
        prices = found[0][1].numpy()
        predicted = {
            name: _mean([predictions[name].numpy() for predictions, _ in found], seen)[0]
            for name in found[0][0]
        }
        allowed = [each.numpy() for each in allowed_moves(self.tensors)]
        changes = [
            BitChange(
                layer=name,
                bits=int(tensor.integer_bits()),
                step=step,
                measured=float(losses[row, side]),
                standard_error=float(errors[row, side]),
                price=float(prices[row, side]),
                predicted={key: float(table[row, side]) for key, table in predicted.items()},
            )
            for row, (name, tensor) in enumerate(zip(self.names, self.tensors, strict=True))
            for side, step in enumerate((-1, 1))
            if allowed[side][row]
        ]
        moves = {name: {} for name in self.names}
        for key, table in {"loss": losses, **predicted}.items():
            gradients = adjacent_gradients(table, prices, *allowed).numpy()
            for name, gradient in zip(self.names, gradients, strict=True):
                moves[name][key] = -int(gradient)
        return BitProbe(changes, moves)


def _inputs_and_targets(data):
    return data if isinstance(data, tuple) else (data, None)


def _batches(x, y, batch_size):
    """A list of batches `(x, y, sample_weight)`, from arrays or from a dataset of batches."""
    if y is None and (isinstance(x, dict) or hasattr(x, "shape")):
        raise ValueError(
            "`probe_bits` takes arrays with their targets, or a dataset of batches. "
            f"Received: y=None, x of type {type(x).__name__}"
        )
    if y is not None:
        slices = tf.data.Dataset.from_tensor_slices((_as_tuple(x), _as_tuple(y)))
        x = slices.batch(batch_size)
    batches = x if isinstance(x, tf.data.Dataset) else (x[i] for i in range(len(x)))
    return [keras.utils.unpack_x_y_sample_weight(batch) for batch in batches]


def _as_tuple(data):
    """A list of arrays as a tuple, because TensorFlow would stack a list."""
    several = isinstance(data, list) and all(hasattr(each, "shape") for each in data)
    return tuple(data) if several else data


def _mean(values, batches):
    """Mean over the examples of batches, and its standard error; infinite for a single batch.

    Args:
        values: List of one array of means for each batch.
        batches: List of batches, the last of which may be smaller.
    """
    sizes = [len(keras.tree.flatten(batch)[0]) for batch in batches]
    shares = np.divide(sizes, sum(sizes))[:, None, None]
    mean = np.sum(shares * values, axis=0)
    if len(batches) == 1:
        return mean, np.full_like(mean, np.inf)
    # For batches of equal size this is the standard deviation over the root of their number.
    squares = np.sum(np.square(shares * (values - mean)), axis=0)
    return mean, np.sqrt(squares * len(batches) / (len(batches) - 1))
