"""`BitObjective`: the two terms that are added to the task's loss."""

import tensorflow as tf

from keras_learnbits.arguments import check_number, choose
from keras_learnbits.layers.discovery import kernels_among
from keras_learnbits.layers.quantized_tensors import integer_widths, latent_widths
from keras_learnbits.numerics import grids
from keras_learnbits.training import penalties


class BitObjective:
    """The penalty on bits and the quantization error, without their factors in the loss.

    Its methods take the list of all `QuantizedTensor`s of a model; `layers` is its length. The
    penalty is on all of them. The quantization error is that of kernels; that of activations
    affects the task's loss only.

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
        """Derivatives of the quantization error with respect to squared errors, `(layers,)`."""
        kernels = kernels_among(tensors)
        errors = tf.stack([kernel.squared_error() for kernel in kernels])
        with tf.GradientTape() as tape:
            tape.watch(errors)
            error = self._error(errors, _squared_norms(kernels), _shares(kernels))
        slopes = iter(tf.unstack(tape.gradient(error, errors), num=len(kernels)))
        return tf.stack([next(slopes) if tensor in kernels else 0.0 for tensor in tensors])

    def penalty_gradients(self, tensors):
        """Derivatives of the penalty with respect to latent bit-widths, shape `(layers,)`."""
        bits = latent_widths(tensors)
        with tf.GradientTape() as tape:
            tape.watch(bits)
            penalty = self._penalty(bits, _shares(tensors))
        return tape.gradient(penalty, bits)

    def penalty_table(self, tensors):
        """Penalty of each layer at 1, 2, ... bits, relative to its current bit-width.

        Returns:
            Float32 tensor of shape `(layers, 16)`.
        """
        widths = tf.range(grids.MIN_BITS, grids.MAX_BITS + 1, dtype=tf.float32)
        # `0 * bits` broadcasts the widths to shape `(16, layers)`.
        return self._penalty_at(tensors, lambda bits: 0.0 * bits + widths[:, None])

    def penalty_changes(self, tensors):
        """Changes of the penalty with one bit fewer and with one more, shape `(layers, 2)`."""
        return self._penalty_at(tensors, lambda bits: bits + tf.constant([[-1.0], [1.0]]))

    def _penalty_at(self, tensors, other):
        """Changes of each layer's penalty at other bit-widths, shape `(layers, cases)`.

        Args:
            tensors: List of `QuantizedTensor`s.
            other: Function of the integer bit-widths to others, of shape `(cases, layers)`.
        """
        bits, shares = integer_widths(tensors), _shares(tensors)
        return tf.transpose(self._penalty(other(bits), shares) - self._penalty(bits, shares))


class ErrorTerm:
    """The term `quantization_reg * quantization_error` of the loss.

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
        """Derivatives of the loss with respect to squared errors of tensors, shape `(layers,)`."""
        indices = [self._tensors.index(tensor) for tensor in tensors]
        return self.weight * tf.gather(self._objective.error_weights(self._tensors), indices)


def bit_settings(defaults, **given):
    """The arguments of `compile` that concern bits, with defaults instead of None.

    Args:
        defaults: Dictionary, the `compile_defaults` of an estimator.
        **given: Arguments of `compile`.

    Raises:
        ValueError: A price is negative or not finite.
    """
    settings = {**defaults, **{name: value for name, value in given.items() if value is not None}}
    for name in ("bit_reg", "quantization_reg"):
        check_number(name, settings[name], 0)
    return settings


def mean_bits(tensors):
    """Mean latent bits per weight, or per activation value.

    Args:
        tensors: List of `QuantizedTensor` of one kind.

    Returns:
        Float32 scalar, in bits.
    """
    return tf.reduce_sum(penalties.mean_bits(latent_widths(tensors), _shares(tensors)))


def _squared_norms(kernels):
    return tf.stack([kernel.squared_norm() for kernel in kernels])


def _shares(tensors):
    """Each tensor's share of all weights, or of all activation values, shape `(layers,)`."""
    totals = {}
    for tensor in tensors:
        totals[type(tensor)] = totals.get(type(tensor), 0) + tensor.size
    return tf.constant([tensor.size / totals[type(tensor)] for tensor in tensors], tf.float32)
