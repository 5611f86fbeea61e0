"""`BitObjective`: the two terms that are added to the task's loss, for a model's kernels."""

import tensorflow as tf

from keras_learnbits import ops, penalties
from keras_learnbits.serialization import choose


class BitObjective:
    """What bits cost and what rounding costs, without their weights in the loss.

    Args:
        bit_penalty: `"bits"` or `"levels"`.
        quantization_error: `"relative"` or `"squared"`.

    Raises:
        ValueError: A name is unknown.
    """

    def __init__(self, bit_penalty, quantization_error):
        self._penalty = choose(bit_penalty, penalties.BIT_PENALTIES, "bit_penalty")
        self._error = choose(
            quantization_error, penalties.QUANTIZATION_ERRORS, "quantization_error"
        )

    def penalty(self, kernels):
        """Penalty at the latent bit-widths, a float32 scalar."""
        return tf.reduce_sum(self._penalty(_bits(kernels), _sizes(kernels)))

    def mean_bits(self, kernels):
        """Mean latent bits per weight, a float32 scalar."""
        return tf.reduce_sum(penalties.mean_bits(_bits(kernels), _sizes(kernels)))

    def quantization_error(self, kernels):
        """Quantization error of all kernels, a float32 scalar."""
        errors = tf.stack([kernel.squared_error() for kernel in kernels])
        return self._error(errors, _energies(kernels), _sizes(kernels))

    def error_weights(self, kernels):
        """Derivatives of the quantization error by the squared errors, shape `(layers,)`."""
        errors = tf.zeros(len(kernels))  # any will do, for the error is linear in them
        with tf.GradientTape() as tape:
            tape.watch(errors)
            error = self._error(errors, _energies(kernels), _sizes(kernels))
        return tape.gradient(error, errors)

    def penalty_gradients(self, kernels):
        """Derivatives of the penalty by the latent bit-widths, shape `(layers,)`."""
        bits = _bits(kernels)
        with tf.GradientTape() as tape:
            tape.watch(bits)
            penalty = self._penalty(bits, _sizes(kernels))
        return tape.gradient(penalty, bits)

    def penalty_table(self, kernels):
        """Penalty of each layer at 1, 2, ... bits, relative to its present width.

        Returns:
            Float32 tensor of shape `(layers, 16)`.
        """
        widths = tf.range(ops.MIN_BITS, ops.MAX_BITS + 1, dtype=tf.float32)
        return self._penalty_at(kernels, lambda bits: 0.0 * bits + widths[:, None])

    def penalty_changes(self, kernels):
        """Changes of the penalty with one bit fewer and with one more, shape `(layers, 2)`."""
        return self._penalty_at(kernels, lambda bits: bits + tf.constant([[-1.0], [1.0]]))

    def _penalty_at(self, kernels, other):
        """Changes of each layer's penalty at `other(bits)`, shape `(cases, layers)` transposed."""
        bits, sizes = tf.stack([kernel.integer_bits() for kernel in kernels]), _sizes(kernels)
        return tf.transpose(self._penalty(other(bits), sizes) - self._penalty(bits, sizes))


def _bits(kernels):
    return tf.stack([kernel.bits.value for kernel in kernels])


def _energies(kernels):
    return tf.stack([kernel.energy() for kernel in kernels])


def _sizes(kernels):
    return [kernel.size for kernel in kernels]
