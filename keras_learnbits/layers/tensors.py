"""What has a bit-width: `QuantizedTensor`, `QuantizedKernel`, and how a model's are found."""

import contextlib
import math
import threading

import numpy as np
import tensorflow as tf

from keras_learnbits import ops
from keras_learnbits.layers.computing import keeping_scales, uses_float_kernels


class QuantizedTensor:
    """What has a bit-width: a kernel, or what flows through a `LearnedBitActivation`.

    Attributes:
        layer: The layer it belongs to.
        bits: Scalar `keras.Variable`, the latent real bit-width in bits.
        size: Number of weights, or of values that flow for one example.
        trainable: Whether its bits are trained.
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
        """The bit-width in use, a float32 scalar tensor."""
        return ops.integer_bits(self.latent_bits())

    def may_move(self):
        """1.0 where its bits may move by now, else 0.0, a float32 scalar."""
        return 1.0

    def squared_error(self):
        """Squared quantization error, a float32 scalar."""
        return self.squared_error_at(self.integer_bits())

    def squared_error_at(self, bits):
        """Squared quantization error at another bit-width, a float32 scalar."""
        raise NotImplementedError

    def energy(self):
        """Sum of squares of what is quantized, a float32 scalar."""
        raise NotImplementedError


class QuantizedKernel(QuantizedTensor):
    """One float kernel with its bit-width, its scales and its quantizer.

    Attributes, beside those of every quantized tensor:
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
        """The layer's name, or `of_layer`; where a layer has several kernels, `layer/kernel`."""
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
        """The tensors a quantizer takes: kernel, bits, log_scale."""
        return self._float32_at(self.latent_bits())

    def _float32_at(self, bits):
        """The same at another bit-width."""
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

    def rounded(self):
        """The kernel at its bit-width in the layer's compute dtype, squared error, and energy.

        Within `rounding_once` the same three tensors each time.
        """

        def rounded():
            return self.quantizer.quantize_with_error(
                *self._float32(), self.layer.compute_dtype, by_bits=_ROUNDED.by_bits
            )

        return once("rounded", self, rounded)

    def used_by_layer(self):
        """What the layer computes with, in its compute dtype.

        The quantized kernel; within `computing_with_float_kernels` the float one.
        """
        if uses_float_kernels():
            return tf.cast(tf.convert_to_tensor(self.kernel.value), self.layer.compute_dtype)
        return self.rounded()[0]

    def squared_error(self):
        """`||q - W||^2`, a float32 scalar."""
        return self.rounded()[1]

    def squared_error_at(self, bits):
        """`||q - W||^2` at another bit-width, a float32 scalar."""
        return self.quantizer.squared_error(*self._float32_at(bits))

    def energy(self):
        """`||W||^2`, a float32 scalar; taken as a constant."""
        return self.rounded()[2]

    def fit_scale(self):
        """Sets the scales to those with the least squared error at the present bit-width."""
        if self.log_scale is not None:
            kernel, bits, _ = self._float32()
            shape = self.log_scale.shape
            self.log_scale.assign(self.quantizer.fitted_log_scale(kernel, bits, shape))


def latent_widths(tensors):
    """The real bit-widths of a list of `QuantizedTensor`s, shape `(layers,)`.

    Within `rounding_once` the same tensor each time.
    """

    def stacked():
        return tf.stack([tensor.latent_bits() for tensor in tensors])

    return once("latent_widths", tuple(tensors), stacked)


def integer_widths(tensors):
    """The bit-widths in use of a list of `QuantizedTensor`s, shape `(layers,)`."""
    return ops.integer_bits(latent_widths(tensors))


def quantized_tensors(model):
    """All that has a bit-width in a model or layer: kernels, then activations.

    Args:
        model: A built Keras model or layer; of a distiller, that of its student.

    Returns:
        List of `QuantizedTensor`, each once, in the order of the variables.
    """
    marking = _marking(model)
    return kernels_among(marking) + activations_among(marking)


def quantized_kernels(model):
    """All quantized kernels of a model or layer, each once, in the order of the variables.

    Args:
        model: A built Keras model or layer; of a distiller, that of its student.

    Returns:
        List of `QuantizedKernel`.
    """
    return kernels_among(_marking(model))


def kernels_among(tensors):
    """Those of a list of `QuantizedTensor`s that are kernels."""
    return [tensor for tensor in tensors if isinstance(tensor, QuantizedKernel)]


def activations_among(tensors):
    """Those of a list of `QuantizedTensor`s that are no kernels."""
    return [tensor for tensor in tensors if not isinstance(tensor, QuantizedKernel)]


def learner_of(model):
    """The model whose bits are learned: of a distiller the student, else the model itself."""
    return model.bit_learner() if hasattr(model, "bit_learner") else model


def _marking(model):
    owners = [quantized_tensor_of(variable) for variable in learner_of(model).variables]
    return list({id(owner): owner for owner in owners if owner is not None}.values())


def unique_names(tensors):
    """Names for logs and tables: the layers' own, and their paths where names repeat.

    Args:
        tensors: List of `QuantizedTensor`.

    Returns:
        List of as many different strings.
    """
    names = [tensor.name() for tensor in tensors]
    if len(set(names)) < len(names):
        names = [tensor.name(of_layer=tensor.layer.path) for tensor in tensors]
    repeated = {name for name in names if names.count(name) > 1}
    return [f"{name}_{index}" if name in repeated else name for index, name in enumerate(names)]


def mark_variables(tensor, *variables):
    """Marks variables (or None) as a quantized tensor's, so that it is found however deep."""
    for variable in variables:
        if variable is not None:
            variable.quantized_tensor = tensor


def quantized_tensor_of(variable):
    """The `QuantizedTensor` whose bit-width or scales a variable holds, else None."""
    return getattr(variable, "quantized_tensor", None)


def float_weights(layer):
    """Weights of a layer or model without bits and scales, in order."""
    return [v for v in layer.weights if quantized_tensor_of(v) is None]


def assign_all(variables, values):
    """Assigns as many values to variables, in order."""
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


class TakesFloatWeights:
    """A layer or model whose `set_weights` takes float weights, too. Goes before Keras's class."""

    def set_weights(self, weights):
        """Sets all weights; or only the float ones, as of the Keras layer or model, in order.

        With float ones scales are fitted to the new kernels, and bits stay, as with `warm_start`.

        Raises:
            ValueError: Numbers or shapes of the weights are others.
        """
        floats = float_weights(self)
        if len(weights) != len(floats) or len(floats) == len(self.weights):
            with keeping_scales():
                super().set_weights(weights)
            return
        shapes, given = [tuple(v.shape) for v in floats], [np.shape(value) for value in weights]
        if shapes != given:
            raise ValueError(
                "`set_weights` takes weights of the shapes that there are. "
                f"Received: shapes {given} for {shapes} in {self.name!r}"
            )
        with keeping_scales():
            assign_all(floats, weights)
        for kernel in quantized_kernels(self):
            kernel.fit_scale()


def without_fixed_scales(variables):
    """Without the scales of kernels that are not trained, which may lie inside other layers."""
    tensors = [quantized_tensor_of(variable) for variable in variables]
    return [
        variable
        for variable, tensor in zip(variables, tensors, strict=True)
        if tensor is None or tensor.trainable
    ]


class _Rounded(threading.local):
    """Results by name, kernels and graph, None outside of any scope; and whether gradients by
    the bits are wanted.
    """

    results = None
    by_bits = True


_ROUNDED = _Rounded()


def once(name, of, function):
    """The result of a function; within `rounding_once` that of the first call in this graph."""
    if _ROUNDED.results is None:
        return function()
    key = name, of, tf.compat.v1.get_default_graph()
    if key not in _ROUNDED.results:
        _ROUNDED.results[key] = function()
    return _ROUNDED.results[key]


def rounding_once(by_bits=False):
    """A scope in which kernels, bits and scales do not change: each kernel is rounded once.

    Args:
        by_bits: Whether gradients by the bits are wanted.
    """
    return _state({}, by_bits)


def rounding_anew():
    """A scope within `rounding_once` that rounds each time, for the way back.

    Layers under `keras.RematScope` are called once more there, and their kernels' gradients flow
    through what is rounded in that call.
    """
    return _state(None, _ROUNDED.by_bits)


@contextlib.contextmanager
def _state(results, by_bits):
    outer = _ROUNDED.results, _ROUNDED.by_bits
    _ROUNDED.results, _ROUNDED.by_bits = results, by_bits
    try:
        yield
    finally:
        _ROUNDED.results, _ROUNDED.by_bits = outer
