"""`BitObjective`: the two terms that are added to the task's loss, for what a model quantizes."""

import tensorflow as tf

from keras_learnbits.arguments import check_number, choose
from keras_learnbits.layers.discovery import kernels_among
from keras_learnbits.layers.quantized_tensors import integer_widths, latent_widths
from keras_learnbits.numerics import grids
from keras_learnbits.training import penalties


class BitObjective:
    """What bits cost and what rounding costs, without their weights in the loss.

    Its methods take all `QuantizedTensor`s of a model, `layers` of them. All have a price;
    kernels have a quantization error, too, while that of activations is seen by the task alone.

    Args:
        bit_penalty: `"bits"`, `"levels"`, `"widths"`, or a function like
            `keras_learnbits.training.penalties.mean_bits`.
        quantization_error: `"relative"`, `"squared"`, or a function like
            `keras_learnbits.training.penalties.relative_error`.

    Raises:
        ValueError: A name is unknown.
    """

    def __init__(self, bit_penalty, quantization_error):
        self._penalty = choose(bit_penalty, penalties.BIT_PENALTIES, "bit_penalty", custom=True)
        self._error = choose(
            quantization_error, penalties.QUANTIZATION_ERRORS, "quantization_error", custom=True
        )

    def penalty(self, tensors):
        """Penalty at the latent bit-widths, a float32 scalar."""
        return tf.reduce_sum(self._penalty(latent_widths(tensors), _shares(tensors)))

    def quantization_error(self, tensors):
        """Quantization error of all kernels, a float32 scalar."""
        kernels = kernels_among(tensors)
        errors = tf.stack([kernel.squared_error() for kernel in kernels])
        return self._error(errors, _squared_norms(kernels), _shares(kernels))

    def error_weights(self, tensors):
        """Derivatives of the quantization error by the squared errors, shape `(layers,)`."""
        kernels = kernels_among(tensors)
        errors = tf.stack([kernel.squared_error() for kernel in kernels])
        with tf.GradientTape() as tape:
            tape.watch(errors)
            error = self._error(errors, _squared_norms(kernels), _shares(kernels))
        slopes = iter(tf.unstack(tape.gradient(error, errors), num=len(kernels)))
        return tf.stack([next(slopes) if tensor in kernels else 0.0 for tensor in tensors])

    def penalty_gradients(self, tensors):
        """Derivatives of the penalty by the latent bit-widths, shape `(layers,)`."""
        bits = latent_widths(tensors)
        with tf.GradientTape() as tape:
            tape.watch(bits)
            penalty = self._penalty(bits, _shares(tensors))
        return tape.gradient(penalty, bits)

    def penalty_table(self, tensors):
        """Penalty of each layer at 1, 2, ... bits, relative to its present width.

        Returns:
            Float32 tensor of shape `(layers, 16)`.
        """
        widths = tf.range(grids.MIN_BITS, grids.MAX_BITS + 1, dtype=tf.float32)
        return self._penalty_at(tensors, lambda bits: 0.0 * bits + widths[:, None])

    def penalty_changes(self, tensors):
        """Changes of the penalty with one bit fewer and with one more, shape `(layers, 2)`."""
        return self._penalty_at(tensors, lambda bits: bits + tf.constant([[-1.0], [1.0]]))

    def _penalty_at(self, tensors, other):
        """Changes of each layer's penalty at `other(bits)`, shape `(cases, layers)` transposed."""
        bits, shares = integer_widths(tensors), _shares(tensors)
        return tf.transpose(self._penalty(other(bits), shares) - self._penalty(bits, shares))


class ErrorTerm:
    """The quantization error's share of the loss, `quantization_reg * quantization_error`.

    Args:
        objective: `BitObjective`.
        weight: `quantization_reg`, a scalar tensor.
        tensors: List of all `QuantizedTensor`s of the model.
    """

    def __init__(self, objective, weight, tensors):
        self.weight = tf.convert_to_tensor(weight)
        self._objective = objective
        self._tensors = tensors

    def weights(self, tensors):
        """Loss per squared quantization error of some of the tensors, shape `(layers,)`."""
        indices = [self._tensors.index(tensor) for tensor in tensors]
        return self.weight * tf.gather(self._objective.error_weights(self._tensors), indices)


def bit_settings(defaults, **given):
    """The arguments of `compile` on bits, with defaults in the place of None.

    Args:
        defaults: Dictionary, an estimator's `compile_defaults`.
        **given: What the user gave.

    Raises:
        ValueError: A price is negative or not finite.
    """
    settings = {**defaults, **{name: value for name, value in given.items() if value is not None}}
    for name in ("bit_reg", "quantization_reg"):
        check_number(name, settings[name], 0)
    return settings


def mean_bits(tensors):
    """Mean latent bits per weight, or per value of activations.

    Args:
        tensors: List of `QuantizedTensor` of one kind.

    Returns:
        Float32 scalar, in bits.
    """
    return tf.reduce_sum(penalties.mean_bits(latent_widths(tensors), _shares(tensors)))


def _squared_norms(kernels):
    return tf.stack([kernel.squared_norm() for kernel in kernels])


def _shares(tensors):
    """Share of each among all of its kind, a float32 tensor of shape `(layers,)`."""
    totals = {}
    for tensor in tensors:
        totals[type(tensor)] = totals.get(type(tensor), 0) + tensor.size
    return tf.constant([tensor.size / totals[type(tensor)] for tensor in tensors], tf.float32)
