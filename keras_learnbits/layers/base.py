"""The base of every learned-bit layer: quantized kernels, each with its own bit-width.

A layer declares its quantized kernels as class attributes and leaves everything else to Keras:

    class LearnedBitDense(LearnedBitMixin, keras.layers.Dense):
        kernel = QuantizedWeight(output_axes=(-1,))

Keras's `build` creates the float kernel with `add_weight`, where the mixin adds the bit-width and
the scales. Keras's `call` reads `self.kernel`, which is the quantized kernel during a call.
"""

import inspect
import numbers

import keras
import tensorflow as tf

from keras_learnbits import quantizers
from keras_learnbits._keras import load_variables, save_variables
from keras_learnbits.layers.compute_scope import (
    follow_kernel,
    is_computing,
    keeping_scales,
    marking_call,
    uses_float_kernels,
)
from keras_learnbits.layers.discovery import mark_variables
from keras_learnbits.layers.float_weights import TakesFloatWeights
from keras_learnbits.layers.layer_copy import dtype_setting
from keras_learnbits.layers.quantized_tensors import QuantizedKernel
from keras_learnbits.numerics import grids

# Bits of the largest bias of a layer whose steps are powers of two: 8 as for activations, and 4
# more because the biases of one layer differ in magnitude.
BIAS_BITS = 12


class ClipBits(keras.constraints.Constraint):
    """Keeps a bit-width within its bounds after each step of an optimizer."""

    def __init__(self, min_bits, max_bits):
        self.min_bits = min_bits
        self.max_bits = max_bits

    def __call__(self, bits):
        return keras.ops.clip(bits, self.min_bits, self.max_bits)


class QuantizedWeight:
    """Class attribute of a layer: the quantized weight inside of `call`, the float one outside.

    During the layer's `call` it is a tensor in the compute dtype, which the layer computes with.
    At other times it is the float `keras.Variable`, as in Keras, to be assigned, constrained and
    saved.

    Args:
        output_axes: Axes of the weight that index the layer's output channels, which may have
            separate scales; or a function from the layer to these axes.
    """

    # A data descriptor (it has `__set__`), because only those take precedence over an entry of the
    # layer's `__dict__`, where `self.kernel = ...` in Keras's `build` would otherwise put it.
    # https://docs.python.org/3/howto/descriptor.html

    def __init__(self, output_axes):
        self.output_axes = output_axes

    def __set_name__(self, owner, name):
        self.name = name

    def __get__(self, layer, owner=None):
        if layer is None:  # read from the class
            return self
        quantized_kernel = layer.quantized_kernels.get(self.name)
        if quantized_kernel is None:
            raise AttributeError(f"You must build the layer before accessing `{self.name}`.")
        return quantized_kernel.used_by_layer() if is_computing(layer) else quantized_kernel.kernel

    def __set__(self, layer, value):
        """Accepts only the weight from `add_weight`, which Keras's `build` assigns."""
        quantized_kernel = layer.quantized_kernels.get(self.name)
        if quantized_kernel is None or value is not quantized_kernel.kernel:
            raise AttributeError(
                f"`{self.name}` of a learned-bit layer is its float variable and cannot be "
                f"replaced: write `layer.{self.name}.assign(values)`. "
                f"Received: a {type(value).__name__} for layer {layer.name!r}"
            )

    def axes_of(self, layer):
        """The axes of the weight that index a layer's output channels."""
        return self.output_axes(layer) if callable(self.output_axes) else self.output_axes


class FixedPointBias:
    """Class attribute of a layer: its bias, in fixed point during a call if steps are powers of 2.

    A circuit adds integers, so a bias must be a multiple of a power of two, as the products are.
    """

    def __set_name__(self, owner, name):
        self.name = name

    def __get__(self, layer, owner=None):
        if layer is None:  # read from the class
            return self
        if self.name not in vars(layer):
            raise AttributeError(f"You must build the layer before accessing `{self.name}`.")
        bias = vars(layer)[self.name]
        if bias is None or not is_computing(layer) or not layer.kernel_quantizer.power_of_two:
            return bias
        return tf.cast(fixed_point_bias(bias), layer.compute_dtype)

    def __set__(self, layer, bias):
        vars(layer)[self.name] = bias

    def __delete__(self, layer):
        del vars(layer)[self.name]


def fixed_point_bias(bias):
    """The bias that a layer whose steps are powers of two adds, a float32 tensor.

    Args:
        bias: `keras.Variable`, or an array that a user has put in its place.
    """
    value = bias.value if isinstance(bias, keras.Variable) else bias
    value = tf.cast(tf.convert_to_tensor(value), tf.float32)
    return value if uses_float_kernels() else grids.fixed_point(value, BIAS_BITS)


class OwnsBits(TakesFloatWeights):
    """Base class of layers with quantized kernels: settings, bit-widths and scales.

    It goes before a Keras layer class.

    Args:
        *args: Arguments of the Keras layer.
        **kwargs: Arguments of the Keras layer.
        bits: Initial bit-width; may be fractional, the nearest integer is used.
        min_bits: Lowest bit-width a kernel may reach, an integer >= 1.
        max_bits: Highest bit-width a kernel may reach, an integer <= 16.
        kernel_quantizer: `"learned_scale"`, `"min_max"` or a quantizer.

    Raises:
        ValueError: `1 <= min_bits <= bits <= max_bits <= 16` does not hold, or the quantizer is
            unknown.
    """

    def __init__(
        self,
        *args,
        bits=8,
        min_bits=1,
        max_bits=8,
        kernel_quantizer="learned_scale",
        **kwargs,
    ):
        check_bits(bits, min_bits, max_bits)
        quantizer = quantizers.get(kernel_quantizer)
        super().__init__(*args, **kwargs)
        self.initial_bits = bits
        self.min_bits = min_bits
        self.max_bits = max_bits
        self.kernel_quantizer = quantizer

    @property
    def quantized_kernels(self):
        """Dictionary of weight name to `QuantizedKernel`; empty before the layer is built."""
        # Kept in `__dict__`: `Layer.__setattr__` would replace the dictionary by a tracked one.
        return self.__dict__.get("_quantized_kernels", {})

    @property
    def bits(self):
        """The bit-width, a scalar `keras.Variable`; a tuple of them if there are several."""
        variables = tuple(kernel.bits for kernel in self.quantized_kernels.values())
        if not variables:
            raise AttributeError("You must build the layer before accessing `bits`.")
        return variables[0] if len(variables) == 1 else variables

    def quantize_weight(self, name, kernel, output_axes, prefix):
        """Creates the bit-width and the scales of a kernel.

        Args:
            name: Name of the kernel in this layer.
            kernel: Float `keras.Variable`.
            output_axes: Axes of the kernel that index output channels.
            prefix: Prefix of the names of the new variables.
        """
        # Keras's `add_weight`, because the mixin's `add_weight` calls this method.
        add_weight = super().add_weight
        bits = add_weight(
            name=f"{prefix}bits",
            shape=(),
            initializer=keras.initializers.Constant(float(self.initial_bits)),
            constraint=ClipBits(self.min_bits, self.max_bits),
            dtype="float32",
            autocast=False,  # float16 would round a bit-width to steps of 0.01
            trainable=False,  # only a `LearnedBitModel` trains bit-widths
            aggregation="mean",
        )
        quantizer, log_scale = self.kernel_quantizer, None
        scale_shape = quantizer.scale_shape(tuple(kernel.shape), output_axes)
        if scale_shape is not None:
            log_scale = add_weight(
                name=f"{prefix}log_scale",
                shape=scale_shape,
                initializer=lambda shape, dtype=None: quantizer.initial_log_scale(
                    tf.convert_to_tensor(kernel.value), shape
                ),
                dtype="float32",
                autocast=False,
            )
            # Not an argument of `add_weight`: by that argument Keras (keras/src/layers/layer.py,
            # `_track_variable`) chooses once and for all the list in which it keeps the variable.
            log_scale.trainable = kernel.trainable
        quantized_kernel = QuantizedKernel(self, name, kernel, bits, log_scale, quantizer)
        mark_variables(quantized_kernel, bits, log_scale)
        self.__dict__.setdefault("_quantized_kernels", {})[name] = quantized_kernel

    def plain_weights(self):
        """Values for the weights of the plain twin, in its order, with quantized kernels.

        Returns:
            List of tensors for the kernels and for biases in fixed point, and of `keras.Variable`
            for all other weights.
        """
        kernels = self.quantized_kernels.values()
        left_out = {id(variable) for k in kernels for variable in (k.bits, k.log_scale)}
        quantized = {id(k.kernel): k.quantized() for k in kernels} | self._fixed_point_biases()
        weights = [weight for weight in self.weights if id(weight) not in left_out]
        return [quantized.get(id(weight), weight) for weight in weights]

    def _fixed_point_biases(self):
        """Dictionary of the `id` of the bias to its value in fixed point; empty without such."""
        bias = vars(self).get("bias")
        if bias is None or not self.kernel_quantizer.power_of_two:
            return {}
        return {id(bias): fixed_point_bias(bias)}

    save_own_variables = save_variables

    def load_own_variables(self, store):
        own = {}
        self.save_own_variables(own)
        if self.built and len(store) != len(own):
            raise ValueError(
                f"A learned-bit layer has {len(own)} variables with its bits and scales. If the "
                "file has the weights of a float model, load it into that model and call "
                "`keras_learnbits.warm_start(model, float_model)`. "
                f"Received: {len(store)} variables for layer {self.name!r}"
            )
        with keeping_scales():  # the file has scales, which need not be fitted to its kernels
            load_variables(self, store)
        check_loaded_bits(self, self.quantized_kernels.values())

    def get_config(self):
        return {
            **super().get_config(),
            "bits": self.initial_bits,
            "min_bits": self.min_bits,
            "max_bits": self.max_bits,
            "kernel_quantizer": quantizers.serialize(self.kernel_quantizer),
        }


class LearnedBitMixin(OwnsBits):
    """Gives a Keras layer quantized kernels with trainable bit-widths.

    Put it before the Keras layer. In a `LearnedBitModel` the bit-widths are learned. In any other
    Keras model the layer does quantization-aware training at constant bit-widths, which are listed
    among the non-trainable weights.

    Args:
        *args: Arguments of the Keras layer.
        **kwargs: Arguments of the Keras layer, and the following ones.

    Keyword Args:
        bits: Initial bit-width; may be fractional, the nearest integer is used.
        min_bits: Lowest bit-width the layer may reach, an integer >= 1.
        max_bits: Highest bit-width the layer may reach, an integer <= 16.
        kernel_quantizer: `"learned_scale"`, `"min_max"` or a quantizer.

    Raises:
        ValueError: `1 <= min_bits <= bits <= max_bits <= 16` does not hold, the quantizer is
            unknown, the dtype policy is an integer or float8 one, or LoRA is enabled.
    """

    bias = FixedPointBias()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.quantized_weights = {
            name: weight
            for name in dir(cls)
            if isinstance(weight := inspect.getattr_static(cls, name), QuantizedWeight)
        }
        # `__init__` takes `*args, **kwargs`, which `help` and editors would show otherwise.
        cls.__signature__ = _merged_signature(cls)
        cls.call = marking_call(cls.call)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if getattr(self, "lora_rank", None):
            self.enable_lora(self.lora_rank)
        if self.quantization_mode is not None:
            raise ValueError(
                f"{type(self).__name__} quantizes its kernel itself and takes float dtype policies "
                f"only. Received: dtype={self.dtype_policy.name!r}"
            )

    def add_weight(self, *args, name=None, **kwargs):
        if name not in self.quantized_weights:
            if name == "bias" and self.kernel_quantizer.power_of_two:
                kwargs["autocast"] = False  # as for kernels
            return super().add_weight(*args, name=name, **kwargs)
        dtype = keras.backend.standardize_dtype(kwargs.get("dtype") or self.variable_dtype)
        if not tf.as_dtype(dtype).is_floating:
            raise ValueError(
                f"A learned-bit layer needs a floating-point `{name}`, which it quantizes itself. "
                f"Received: dtype={dtype!r} in layer {self.name!r}"
            )
        # Without autocast the kernel has full precision under mixed policies, too; otherwise Keras
        # would cast it to the compute dtype before it is rounded to its grid.
        kernel = super().add_weight(*args, name=name, autocast=False, **kwargs)
        prefix = f"{name}_" if len(self.quantized_weights) > 1 else ""
        output_axes = self.quantized_weights[name].axes_of(self)
        self.quantize_weight(name, kernel, output_axes, prefix)
        if self.quantized_kernels[name].log_scale is not None:
            follow_kernel(self.quantized_kernels[name])
        return kernel

    def plain_twin(self, float32=False):
        """A layer of the Keras class with the same configuration; it is not built.

        Args:
            float32: Whether it computes in float32 even if this layer has a mixed precision.
        """
        config = super(OwnsBits, self).get_config()  # without the settings of bits
        return keras_twin(type(self)).from_config({**config, **dtype_setting(self, float32)})

    def enable_lora(self, rank, **kwargs):
        raise ValueError(
            "LoRA is not supported, because its update of a frozen kernel would not be quantized. "
            f"Received: rank={rank} in layer {self.name!r}"
        )


def check_bits(bits, min_bits, max_bits):
    """Raises a ValueError unless `1 <= min_bits <= bits <= max_bits <= 16`, bounds integers."""
    integers = all(isinstance(bound, numbers.Integral) for bound in (min_bits, max_bits))
    if not integers or not grids.MIN_BITS <= min_bits <= max_bits <= grids.MAX_BITS:
        raise ValueError(
            "`min_bits` and `max_bits` must be integers with "
            f"{grids.MIN_BITS} <= min_bits <= max_bits <= {grids.MAX_BITS}. "
            f"Received: min_bits={min_bits}, max_bits={max_bits}"
        )
    if not isinstance(bits, numbers.Real) or not min_bits <= bits <= max_bits:
        raise ValueError(
            "`bits` must be a number with min_bits <= bits <= max_bits. "
            f"Received: bits={bits}, min_bits={min_bits}, max_bits={max_bits}"
        )


def check_loaded_bits(layer, tensors):
    """Raises a ValueError if a file had bit-widths outside of a layer's bounds.

    Those bit-widths are set to the initial ones.

    Args:
        layer: Layer with `initial_bits`, `min_bits` and `max_bits`.
        tensors: List of the layer's `QuantizedTensor`s.
    """
    loaded = {tensor: float(tensor.latent_bits()) for tensor in tensors}
    outside = [t for t, bits in loaded.items() if not layer.min_bits <= bits <= layer.max_bits]
    for tensor in outside:
        tensor.bits.assign(layer.initial_bits)
    if outside:
        raise ValueError(
            "The bit-widths of a file must lie within the bounds of their layers. "
            f"Received: bits={[loaded[tensor] for tensor in outside]} for layer {layer.name!r}, "
            f"with min_bits={layer.min_bits}, max_bits={layer.max_bits}"
        )


def keras_twin(cls):
    """The Keras class that a learned-bit layer class extends."""
    layers = (base for base in cls.__mro__ if issubclass(base, keras.layers.Layer))
    return next(base for base in layers if not issubclass(base, OwnsBits))


def _merged_signature(cls):
    """Arguments of the Keras class followed by those of the mixin, for `help` and editors."""
    theirs = list(inspect.signature(keras_twin(cls).__init__).parameters.values())[1:]  # no self
    of_mixin = inspect.signature(OwnsBits.__init__).parameters.values()
    ours = [parameter for parameter in of_mixin if parameter.kind is parameter.KEYWORD_ONLY]
    # `inspect` requires `**kwargs` to be the last parameter.
    rest = [p for p in theirs if p.kind is p.VAR_KEYWORD]
    return inspect.Signature([p for p in theirs if p not in rest] + ours + rest)
