"""Tensors with a bit-width: `QuantizedTensor` and `QuantizedKernel`."""

import math
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from keras_learnbits.layers.compute_scope import uses_float_kernels, wants_bit_gradients
from keras_learnbits.layers.rounding_scope import once
from keras_learnbits.layers.stored_kernel import StoredKernel
from keras_learnbits.numerics import grids


class RoundedKernel(NamedTuple):
    """A kernel at its bit-width.

    Attributes:
        levels: The quantized kernel, in the layer's compute dtype.
        squared_error: `||q - W||^2`, a float32 scalar.
        squared_norm: `||W||^2`, a float32 scalar.
    """

    levels: tf.Tensor
    squared_error: tf.Tensor
    squared_norm: tf.Tensor


class QuantizedTensor:
    """A tensor with a bit-width: a kernel, or the input of a `LearnedBitActivation`.

    Attributes:
        layer: The learned-bit layer that it belongs to.
        bits: Scalar `keras.Variable`, the latent real bit-width.
        size: Number of weights, or of values per example.
        trainable: Whether its bit-width is trained.
    """

    def __init__(self, layer, bits):
        self.layer = layer
        self.bits = bits

    def name(self, of_layer=None):
        """The layer's name, or `of_layer`."""
        return of_layer or self.layer.name

    def latent_bits(self):
        """The real bit-width that is trained, a float32 scalar tensor."""
        return tf.convert_to_tensor(self.bits.value)

    def integer_bits(self):
        """The bit-width that is used, a float32 scalar tensor with an integer."""
        return grids.integer_bits(self.latent_bits())

    def may_move(self):
        """1.0 if its bit-width may change in this step, otherwise 0.0; a float32 scalar."""
        return 1.0

    def squared_error(self):
        """Squared quantization error, a float32 scalar."""
        return self.squared_error_at(self.integer_bits())

    def squared_error_at(self, bits):
        """Squared quantization error at another bit-width, a float32 scalar."""
        raise NotImplementedError

    def squared_norm(self):
        """Sum of the squares of the float values, a float32 scalar."""
        raise NotImplementedError


class QuantizedKernel(QuantizedTensor):
    """One float kernel with its bit-width, its scales and its quantizer.

    Attributes, in addition to those of `QuantizedTensor`:
        weight_name: Name of the kernel in the layer, e.g. `"kernel"` or `"pointwise_kernel"`.
        kernel: Float `keras.Variable`.
        log_scale: `keras.Variable` with the natural logarithm of the scales, or None.
        quantizer: `keras_learnbits.quantizers.Quantizer`.
    """

    def __init__(self, layer, weight_name, kernel, bits, log_scale, quantizer):
        super().__init__(layer, bits)
        self.weight_name = weight_name
        self.kernel = kernel
        self.log_scale = log_scale
        self.quantizer = quantizer

    def name(self, of_layer=None):
        """The layer's name, or `of_layer`; `layer/kernel` if the layer has several kernels."""
        of_layer = super().name(of_layer)
        several = len(self.layer.quantized_kernels) > 1
        return f"{of_layer}/{self.weight_name}" if several else of_layer

    @property
    def size(self):
        """Number of weights."""
        return math.prod(self.kernel.shape)

    @property
    def trainable(self):
        return self.kernel.trainable

    def _float32(self):
        """The arguments of a quantizer's methods: kernel, bits, log_scale."""
        return self._float32_at(self.latent_bits())

    def _float32_at(self, bits):
        """The arguments of a quantizer's methods at another bit-width."""
        kernel = tf.cast(tf.convert_to_tensor(self.kernel.value), tf.float32)
        log_scale = None if self.log_scale is None else tf.convert_to_tensor(self.log_scale.value)
        return kernel, bits, log_scale

    def quantized(self):
        """The kernel at its bit-width, a float32 tensor of the kernel's shape."""
        return self.quantizer.quantize(*self._float32())

    def quantized_at(self, bits):
        """The kernel at another bit-width, a float32 tensor of the kernel's shape."""
        return self.quantizer.quantize(*self._float32_at(bits))

    def encode(self):
        """Integer codes (int32, the kernel's shape) and the `Grid` that decodes them."""
        return self.quantizer.encode(*self._float32())

    def stored(self, name=None):
        """The kernel in the form in which files store it.

        Args:
            name: Name for files and tables; by default `name()`.

        Returns:
            `StoredKernel`. Its steps and offsets have the same shape, with as many axes as the
            kernel.
        """
        codes, grid = self.encode()
        step, offset = np.broadcast_arrays(grid.step.numpy(), grid.offset.numpy())
        shape = (1,) * (codes.shape.rank - step.ndim) + step.shape
        return StoredKernel(
            self.name() if name is None else name,
            int(self.integer_bits()),
            codes.numpy(),
            step.reshape(shape),
            offset.reshape(shape),
        )

    def rounded(self):
        """The kernel at its bit-width, a `RoundedKernel`; computed once within `rounding_once`."""

        def rounded():
            dtype = self.layer.compute_dtype
            inputs = self._float32()
            return RoundedKernel(
                *self.quantizer.quantize_with_error(*inputs, dtype, by_bits=wants_bit_gradients())
            )

        return once("rounded", self, rounded)

    def used_by_layer(self):
        """The kernel that the layer computes with, in the layer's compute dtype.

        It is the quantized kernel, or within `computing_with_float_kernels` the float one.
        """
        if uses_float_kernels():
            return tf.cast(tf.convert_to_tensor(self.kernel.value), self.layer.compute_dtype)
        return self.rounded().levels

    def squared_error(self):
        """`||q - W||^2`, a float32 scalar."""
        return self.rounded().squared_error

    def squared_error_at(self, bits):
        """`||q - W||^2` at another bit-width, a float32 scalar."""
        return self.quantizer.squared_error(*self._float32_at(bits))

    def squared_norm(self):
        """`||W||^2`, a float32 scalar; a constant for gradients."""
        return self.rounded().squared_norm

    def fit_scale(self):
        """Sets the scales to those with the least squared error at the current bit-width."""
        if self.log_scale is not None:
            kernel, bits, _ = self._float32()
            shape = self.log_scale.shape
            self.log_scale.assign(self.quantizer.fitted_log_scale(kernel, bits, shape))


def latent_widths(tensors):
    """The real bit-widths of a list of `QuantizedTensor`s, shape `(layers,)`.

    They are stacked once within `rounding_once`.
    """

    def stacked():
        return tf.stack([tensor.latent_bits() for tensor in tensors])

    return once("latent_widths", tuple(tensors), stacked)


def integer_widths(tensors):
    """The integer bit-widths of a list of `QuantizedTensor`s, shape `(layers,)`."""
    return grids.integer_bits(latent_widths(tensors))
