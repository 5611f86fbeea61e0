"""`LearnedBitActivation`: activations at a learned bit-width."""

import math
import numbers

import keras
import tensorflow as tf

from keras_learnbits.layers.base import ClipBits, check_bits, check_loaded_bits
from keras_learnbits.layers.checks import is_masked
from keras_learnbits.layers.compute_scope import is_calibrating
from keras_learnbits.layers.discovery import mark_variables, quantized_tensor_of
from keras_learnbits.layers.quantized_tensors import QuantizedTensor
from keras_learnbits.quantizers import ActivationQuantizer
from keras_learnbits.serialization import register

# A range is fitted to this many values drawn from a batch. Because the number is fixed, the search
# for a scale is traced once for all layers, and large activations take no longer.
SAMPLE = 2**14
# Names that Keras gives the operations of `LearnedBitActivation.plain`.
OPERATIONS = ("cast", "multiply", "add", "floor", "clip")


class QuantizedActivation(QuantizedTensor):
    """The input of a `LearnedBitActivation`, with its bit-width and its scale."""

    def __init__(self, layer, bits, size):
        super().__init__(layer, bits)
        self.size = size

    @property
    def trainable(self):
        return self.layer.trainable

    def squared_error_at(self, bits):
        """A twelfth of the squared step per value, as for values spread evenly between levels.

        The values themselves are not kept, so the error cannot be computed from them.
        """
        step = self.layer.quantizer().grid(None, bits, self.layer.log_scale()).step
        return self.size * tf.square(step) / 12.0

    def may_move(self):
        # Before the first training batch there is no grid, so the bit-width has no effect.
        return tf.cast(self.layer.batches_seen.value > 0, tf.float32)

    def bounds(self):
        """The lowest and the highest level, two numbers; None before the range is fitted."""
        if not self.layer.is_fitted():
            return None
        step, offset, max_code = map(float, self.layer.grid())
        return step * offset + 0.0, step * (offset + max_code)  # `+ 0.0` turns -0.0 into 0.0

    def squared_norm(self):
        """The squared scale per value, as for values from a Gaussian distribution."""
        return self.size * tf.exp(2.0 * self.layer.log_scale())


@register
class LearnedBitActivation(keras.layers.Layer):
    """Quantizes its input to `2**bits` levels, with a trainable range and bit-width.

    The grid contains 0; it is signed if the calibration data contain negative values. During the
    first training batches the range is fitted to the input by least squared error; afterwards it
    is trained. Before the first training batch the layer returns its input unchanged. In a
    `LearnedBitModel` the bit-width is learned, at a price of `bit_reg` per mean bit per value. This
    needs `bit_gradient="measured"` or `"straight_through"`, and a model that has a learned-bit
    kernel as well.

    Args:
        bits: Initial bit-width; may be fractional, the nearest integer is used.
        min_bits: Lowest bit-width, an integer >= 2 (at 1 bit a signed grid has no level above 0).
        max_bits: Highest bit-width, an integer <= 16.
        calibration_batches: Number of training batches to fit the range to, an integer >= 1. If
            the layer is called several times per step, each call counts.
        power_of_two: Whether the step is a power of two, the one nearest to the trained step.
        **kwargs: `name`, `dtype` and the other arguments of `keras.layers.Layer`.

    Input shape: any, `(batch_size, ...)`. For the price, dimensions that are not fixed count as 1.
    Output shape: the shape of the input.

    Raises:
        ValueError: `2 <= min_bits <= bits <= max_bits <= 16` does not hold, or
            `calibration_batches` is not an integer >= 1.

    Source: levels and gradients as in LSQ (arXiv 1902.08153), with a learned bit-width.

    Examples:
        >>> layer = LearnedBitActivation(bits=2)
        >>> _ = layer(np.array([[0.1, 0.6, 1.5]]), training=True)
        >>> layer(np.array([[-1.0, 0.1, 0.6, 9.0]])).numpy().round(1).tolist()
        [[0.0, 0.0, 0.5, 1.5]]
    """

    def __init__(
        self,
        bits=8,
        min_bits=2,
        max_bits=8,
        calibration_batches=10,
        power_of_two=False,
        **kwargs,
    ):
        check_bits(bits, min_bits, max_bits)
        if min_bits < 2:
            raise ValueError(
                "Activations need `min_bits` >= 2, because with 1 bit a signed grid has no level "
                f"above 0. Received: min_bits={min_bits}"
            )
        if not isinstance(calibration_batches, numbers.Integral) or calibration_batches < 1:
            raise ValueError(
                "`calibration_batches` must be an integer number of batches >= 1. "
                f"Received: calibration_batches={calibration_batches}"
            )
        super().__init__(**kwargs)
        self.initial_bits = bits
        self.min_bits = min_bits
        self.max_bits = max_bits
        self.calibration_batches = int(calibration_batches)
        self.power_of_two = power_of_two
        self.supports_masking = True

    def build(self, input_shape):
        def add_scalar(name, value=0.0, **kwargs):
            initializer = keras.initializers.Constant(value)
            return self.add_weight(
                (), initializer, "float32", name=name, autocast=False, aggregation="mean", **kwargs
            )

        bounds = ClipBits(self.min_bits, self.max_bits)
        self.bits = add_scalar("bits", self.initial_bits, constraint=bounds, trainable=False)
        # The scale is the product of a fitted and a trained factor. So calibration can go on while
        # the scale is being trained, and does not interfere with the optimizer's state.
        self.trained_log_scale = add_scalar("log_scale")
        # Sums over batches and not a running mean: replicas of `tf.distribute` average each
        # variable, and a quotient of averaged sums is right even if some of their batches were
        # unusable.
        self.total_log_scale = add_scalar("total_log_scale", trainable=False)
        self.batches_seen = add_scalar("batches_seen", trainable=False)
        self.signed = add_scalar("signed", trainable=False)
        self.size = math.prod(dimension or 1 for dimension in input_shape[1:])
        mark_variables(
            QuantizedActivation(self, self.bits, self.size),
            *(self.bits, self.trained_log_scale),
            *(self.total_log_scale, self.batches_seen, self.signed),
        )

    def call(self, inputs, training=False):
        inputs = tf.convert_to_tensor(inputs)
        values = tf.reshape(tf.cast(inputs, tf.float32), [-1])
        if training or is_calibrating():
            self._calibrate(values)
        if is_calibrating():
            return inputs
        examples = tf.shape(inputs)[0] if inputs.shape.rank else 1
        # Plain tensors: shared traces must not capture the variables of one layer.
        bits, signed, seen = (
            tf.convert_to_tensor(variable.value)
            for variable in (self.bits, self.signed, self.batches_seen)
        )
        power_of_two = tf.constant(self.power_of_two)
        state = bits, self.log_scale(), signed, power_of_two, seen, examples
        quantized = _quantized(values, *state)
        return tf.cast(tf.reshape(quantized, tf.shape(inputs)), self.compute_dtype)

    def _calibrate(self, values):
        """Adds the scale that fits a batch best to the mean over batches."""
        variables = (self.total_log_scale, self.batches_seen, self.signed)
        state = [tf.convert_to_tensor(variable.value) for variable in variables]
        bits = tf.convert_to_tensor(self.bits.value)
        settings = tf.constant(self.power_of_two), self.calibration_batches
        results = _calibrated(values, bits, *settings, *state)
        # Assigned outside of the `tf.cond` in `_calibrated`: `tf.distribute` averages the replicas'
        # values by a merge call, which TensorFlow does not allow inside of a branch.
        for variable, value in zip(variables, results, strict=True):
            variable.assign(value)

    def log_scale(self):
        """The natural logarithm of the scale, a float32 scalar."""
        fitted = tf.math.divide_no_nan(self.total_log_scale.value, self.batches_seen.value)
        return fitted + self.trained_log_scale.value

    def quantizer(self):
        """`ActivationQuantizer` of this layer, signed or not."""
        return _quantizer(self.signed.value, tf.constant(self.power_of_two))

    def is_fitted(self):
        """Whether the layer was calibrated on at least one training batch."""
        return self.built and bool(tf.convert_to_tensor(self.batches_seen.value) > 0)

    def grid(self):
        """The current `keras_learnbits.numerics.grids.Grid`.

        Raises:
            ValueError: The range has not been fitted yet.
        """
        if not self.is_fitted():
            raise ValueError(
                "A `LearnedBitActivation` has a grid only after it was called on a training "
                f"batch. Received: layer={self.name!r}, which has seen no batch"
            )
        return self.quantizer().grid(None, self.bits.value, self.log_scale())

    def plain(self, inputs, dtype=None):
        """The output of this layer, computed with `keras.ops` and constants only.

        Args:
            inputs: Tensor or `keras.KerasTensor`.
            dtype: Name of the dtype of the result; by default the layer's compute dtype.

        Returns:
            Tensor of the shape of the layer's output.

        Raises:
            ValueError: The range has not been fitted yet.
        """
        step, offset, max_code = map(float, self.grid())
        # The reciprocal is rounded to float32 before it becomes a Python number, so that the codes
        # are those of `ActivationQuantizer` bit for bit.
        in_steps = keras.ops.cast(inputs, "float32") * float(1.0 / self.grid().step)
        low = offset + 0.0  # turns -0.0 into 0.0
        levels = keras.ops.clip(keras.ops.floor(in_steps + 0.5), low, low + max_code)
        return keras.ops.cast(levels * step, dtype or self.compute_dtype)

    def plain_twin(self, float32=False):
        """A function of a tensor that computes this layer's output with `keras.ops` only.

        The function ignores other arguments, and raises a ValueError for a tensor with a mask.

        Args:
            float32: Whether the result is float32 even if this layer has a mixed precision.
        """

        def compute(inputs, **ignored):
            if is_masked(inputs):
                raise ValueError(
                    "Operations of `keras.ops` do not pass on masks, so `to_keras` cannot convert "
                    "a quantized activation after a layer that masks. "
                    f"Received: layer={self.name!r}"
                )
            return self.plain(inputs, "float32" if float32 else None)

        return compute

    def compute_output_shape(self, input_shape):
        return input_shape

    def load_own_variables(self, store):
        super().load_own_variables(store)
        check_loaded_bits(self, [quantized_tensor_of(self.bits)])

    def get_config(self):
        return {
            **super().get_config(),
            "bits": self.initial_bits,
            "min_bits": self.min_bits,
            "max_bits": self.max_bits,
            "calibration_batches": self.calibration_batches,
            "power_of_two": self.power_of_two,
        }


# All layers share these functions, so that TensorFlow traces each of them once, and not once per
# layer. Activations are flattened and all else is a scalar, so that shapes are the same for all.
_VALUES, _NUMBER = tf.TensorSpec([None]), tf.TensorSpec([])
_FLAG, _INTEGER = tf.TensorSpec([], tf.bool), tf.TensorSpec([], tf.int32)


@tf.function(
    input_signature=[_VALUES, _NUMBER, _FLAG, _INTEGER, *[_NUMBER] * 3],
    autograph=False,
)
def _calibrated(values, bits, power_of_two, batches, total, seen, signed):
    """The values of the three calibration variables after one more batch.

    Args:
        values: Float32 tensor, the activations of the batch.
        bits: Float32 scalar, the bit-width.
        power_of_two: Boolean scalar, whether the step is a power of two.
        batches: Number of batches that a range is fitted to.
        total: Sum of the logarithms of the scales that fit the earlier batches.
        seen: Number of earlier batches.
        signed: 1.0 if one of the earlier batches had negative values, otherwise 0.0.
    """
    values = tf.stop_gradient(values)
    old = total, seen, signed

    def fitted():
        negative = tf.cast(tf.reduce_min(values) < 0, tf.float32)
        quantizer = ActivationQuantizer(tf.maximum(signed, negative), power_of_two)
        sample = _sample(values, seed=tf.cast(seen, tf.int32))
        fit = quantizer.fitted_log_scale(sample, bits, (1,))[0]
        # Empty batches, and those of zeros or with NaN, have no scale and are not counted.
        usable = tf.math.is_finite(fit + tf.reduce_mean(values))
        usable = tf.logical_and(usable, tf.reduce_any(sample != 0))
        new = (total + fit, seen + 1.0, quantizer.signed)
        return [tf.where(usable, *pair) for pair in zip(new, old, strict=True)]

    return tf.cond(seen < tf.cast(batches, tf.float32), fitted, lambda: list(old))


@tf.custom_gradient
def _quantized(values, *state):
    """Quantized values; the unchanged ones before a range is fitted.

    Args:
        values: Float32 tensor, the activations of a batch.
        *state: Bit-width, natural logarithm of the scale, the layer's variable `signed`, its
            setting `power_of_two`, its variable `batches_seen`, and the number of examples.
    """
    quantized, *rounded = _quantized_forward(values, *state)

    def gradient(upstream):
        gradients = _quantized_backward(upstream, *rounded, values, *state)
        return *gradients, *[None] * 4  # none for what is not trained

    return quantized, gradient


# Forward and backward pass are two functions, joined by `tf.custom_gradient`: TensorFlow cannot
# differentiate a `tf.cond` inside of a function that XLA compiles, as with `jit_compile=True`.
_STATE = [*[_NUMBER] * 3, _FLAG, _NUMBER, _INTEGER]


@tf.function(input_signature=[_VALUES, *_STATE], autograph=False)
def _quantized_forward(values, bits, log_scale, signed, power_of_two, seen, examples):
    """The quantized values, and what their gradients need: levels in steps, and excess codes."""

    def quantized():
        quantizer = _quantizer(signed, power_of_two)
        rounded = quantizer.rounded(values, bits, log_scale)
        return quantizer.quantize(values, bits, log_scale, rounded), *rounded

    return tf.cond(seen > 0, quantized, lambda: (values, values, values))


@tf.function(input_signature=[*[_VALUES] * 4, *_STATE], autograph=False)
def _quantized_backward(
    upstream, levels, excess, values, bits, log_scale, signed, power_of_two, seen, examples
):
    """Gradients with respect to values, bit-width, and logarithm of the scale."""

    def gradients():
        # The gradients of all values add up to that of the one scale. LSQ divides it by the square
        # root of their number per example (arXiv 1902.08153, section 2.2).
        number = tf.maximum(tf.size(values) / tf.maximum(examples, 1), 1)
        share = tf.cast(number, tf.float32) ** -0.5
        inputs = values, bits, log_scale
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            constant = tf.stop_gradient(log_scale)  # `scale` has its value, and `share` its slope
            scale = constant + share * (log_scale - constant)
            quantizer = _quantizer(signed, power_of_two)
            quantized = quantizer.quantize(values, bits, scale, (levels, excess))
        return tape.gradient(quantized, inputs, upstream)

    zero = tf.constant(0.0)
    return tf.cond(seen > 0, gradients, lambda: (upstream, zero, zero))


def _quantizer(signed, power_of_two):
    # The mean over replicas is a fraction if only some of them saw negative values.
    return ActivationQuantizer(tf.cast(signed > 0, tf.float32), power_of_two)


def _sample(values, seed):
    """`SAMPLE` random values of a batch; zeros if it is empty."""
    flat = tf.concat([tf.reshape(values, [-1]), [0.0]], axis=0)
    number = tf.maximum(tf.size(values, tf.int64), 1)
    seeds = tf.stack([0, seed])
    return tf.gather(
        flat, tf.random.stateless_uniform([SAMPLE], seeds, maxval=number, minval=0, dtype=tf.int64)
    )
