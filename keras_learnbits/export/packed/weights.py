"""The weights of packed files: taken from a model, and loaded into a model."""

import itertools
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_learnbits.export._weights import weight_names
from keras_learnbits.export.packed import reader
from keras_learnbits.export.packed.matching import matched
from keras_learnbits.layers.discovery import quantized_kernels
from keras_learnbits.layers.quantized_tensors import QuantizedKernel
from keras_learnbits.layers.traversal import finalize_inside

# Number of units in the last place around a computed scale among which the exact one is searched.
SEARCHED_ULPS = 8


class ModelWeight(NamedTuple):
    """A weight of a model.

    Attributes:
        name: Name in files.
        older_name: Name in older files: `variable.path`, with its index if that repeats.
        variable: `keras.Variable`.
        kernel: `QuantizedKernel`, or None if the weight is not quantized.
    """

    name: str
    older_name: str
    variable: keras.Variable
    kernel: QuantizedKernel | None


def packed_weights(model, float_dtype):
    """The weights of a model for a packed file, in the model's order, without bits and scales.

    Args:
        model: A built Keras model with learned-bit layers.
        float_dtype: `"float32"` or `"bfloat16"`, the type of float arrays.

    Returns:
        List of `reader.PackedKernel` and `reader.PackedArray`.

    Raises:
        ValueError: A kernel is quantized by two layers, or a weight is not finite in `float_dtype`.

    Examples:
        >>> model = keras.Sequential([keras.Input((4,)), keras_learnbits.LearnedBitDense(2)])
        >>> [weight.shape for weight in packed_weights(model, "float32")]
        [(4, 2), (2,)]
    """
    return [
        _packed_array(weight.name, weight.variable, float_dtype)
        if weight.kernel is None
        else _packed_kernel(weight.name, weight.kernel)
        for weight in model_weights(model)
    ]


def model_weights(model):
    """The weights of a model without bit-widths and scales, in the model's order.

    Args:
        model: A built Keras model.

    Returns:
        List of `ModelWeight`.

    Raises:
        ValueError: A kernel is quantized by two layers.
    """
    kernels = quantized_kernels(model)
    owners = {id(kernel.kernel): kernel for kernel in kernels}
    if len(owners) < len(kernels):
        raise ValueError(
            "A packed file holds each kernel at one bit-width. "
            f"Received: model={model.name!r}, with a kernel that two layers quantize"
        )
    stored_with_kernel = {id(v) for kernel in kernels for v in (kernel.bits, kernel.log_scale)}
    variables = [variable for variable in model.weights if id(variable) not in stored_with_kernel]
    names = weight_names(model)
    paths = [variable.path for variable in variables]
    repeated = {path for path in paths if paths.count(path) > 1}
    return [
        ModelWeight(
            names[id(variable)],
            f"{path}_{index}" if path in repeated else path,
            variable,
            owners.get(id(variable)),
        )
        for index, (path, variable) in enumerate(zip(paths, variables, strict=True))
    ]


def _packed_kernel(name, kernel):
    stored = kernel.stored(name)
    codes, step, offset = stored.codes, stored.step.ravel(), stored.offset.ravel()
    in_range = codes.min() >= 0 and codes.max() <= stored.max_code
    if not in_range or not np.isfinite([step, offset]).all():
        raise ValueError(
            f"Kernels in packed files must be finite. Received: {name!r}, which is not finite"
        )
    scales = step if stored.is_mid_rise else np.concatenate([step, offset])
    return reader.PackedKernel(
        name,
        codes.shape,
        stored.bits,
        "mid_rise" if stored.is_mid_rise else "affine",
        tuple(axis for axis, size in enumerate(stored.step.shape) if size > 1),
        {"codes": reader.pack_codes(codes, stored.bits), "scales": scales},
    )


def _packed_array(name, variable, float_dtype):
    value = tf.convert_to_tensor(variable.value)
    dtype = value.dtype.name
    if value.dtype.is_floating:
        dtype = float_dtype if value.shape.rank else "float32"  # a scalar gains nothing
    elements = tf.reshape(tf.cast(value, dtype), [-1])
    if value.dtype.is_floating and not tf.reduce_all(tf.math.is_finite(elements)):
        raise ValueError(
            f"Weights must be finite as {dtype}. Received: {name!r} of {variable.dtype}"
        )
    elements = elements.numpy()
    _, numpy_type = reader.TYPES[dtype]
    return reader.PackedArray(name, tuple(value.shape), dtype, {dtype: elements.view(numpy_type)})


def fill(model, weights):
    """Sets the weights of a model to those of a packed file.

    They are matched by name, see `matching.matched`.

    Args:
        model: A built Keras model with the layers of the packed one, learned-bit or plain ones.
            Plain layers get the quantized weights.
        weights: List of `reader.PackedKernel` and `reader.PackedArray`.

    Raises:
        ValueError: The model has other weights, or its kernels cannot represent these, because
            quantizer, bounds of bits or dtype differ. Then the model does not change.

    Examples:
        >>> model = keras.Sequential([keras.Input((4,)), keras_learnbits.LearnedBitDense(2)])
        >>> weights = packed_weights(model, "float32")
        >>> plain = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        >>> fill(plain, weights)
        >>> bool(np.all(plain.layers[0].kernel == weights[0].array()))
        True
    """
    # All values are computed and checked before the first one is assigned.
    values = []
    for target, weight in _matched(model, weights):
        if target.kernel is None:
            values.append((target.variable, weight.array()))
        else:
            values += _kernel_values(target, weight)
    for variable, value in values:
        variable.assign(value)
    finalize_inside(model)


def _matched(model, weights):
    """Pairs of `ModelWeight` and its weight in the file."""
    targets = model_weights(model)
    if len(weights) != len(targets):
        raise ValueError(
            "The model must have as many weights as the file. "
            f"Received: {len(targets)} in model {model.name!r}, {len(weights)} in the file"
        )
    indices = matched(
        [weight.name for weight in weights],
        [target.name for target in targets],
        [target.older_name for target in targets],
    )
    weights = [weights[index] for index in indices]
    for target, weight in zip(targets, weights, strict=True):
        shape = tuple(target.variable.shape)
        if shape != weight.shape:
            raise ValueError(
                "The model must have the weights of the file. "
                f"Received: {target.name!r} of shape {shape} in model {model.name!r}, "
                f"{weight.name!r} of shape {weight.shape} in the file"
            )
        quantized = isinstance(weight, reader.PackedKernel)
        if target.kernel is not None and not quantized:
            raise ValueError(
                "Kernels that the model quantizes must be quantized in the file. "
                f"Received: {target.name!r}, with {weight.name!r} of {weight.dtype} in the file"
            )
    return zip(targets, weights, strict=True)


def _kernel_values(target, weight):
    """Values for kernel, bits and scales that give the model the quantized weights of a file."""
    kernel, levels = target.kernel, weight.array()
    if not kernel.layer.min_bits <= weight.bits <= kernel.layer.max_bits:
        raise ValueError(
            "Bits must be within the bounds of the layer. "
            f"Received: {weight.bits} bits in the file, {kernel.layer.min_bits} to "
            f"{kernel.layer.max_bits} of {target.name!r}"
        )
    bits = tf.constant(float(weight.bits))
    # Files have levels only. They also serve as float weights, because each is rounded to itself.
    if kernel.log_scale is None:
        floats, log_scale = _on_range(kernel, bits, weight), None
    else:
        floats, log_scale = levels, _log_scale(kernel, bits, weight)
    quantized = kernel.quantizer.quantize(_stored(kernel, floats), bits, log_scale)
    fits = log_scale is None or log_scale.shape == tuple(kernel.log_scale.shape)
    # With a tolerance, because `exp` may round a step differently on another machine.
    if not fits or not np.allclose(quantized, levels, rtol=1e-6, atol=0):
        raise ValueError(
            "The model must be able to quantize its kernels as in the file. "
            f"Received: {target.name!r} of {kernel.kernel.dtype} with {kernel.quantizer}, "
            f"{weight.bits} bits, {weight.grid} scales of shape {weight.scale_shape} in the file"
        )
    values = [(kernel.kernel, floats), (kernel.bits, bits), (kernel.log_scale, log_scale)]
    return values if log_scale is not None else values[:2]


def _stored(kernel, floats):
    """Float32 values after rounding to the dtype of a kernel."""
    return tf.cast(tf.cast(floats, kernel.kernel.dtype), tf.float32)


def _log_scale(kernel, bits, weight):
    """Logarithms of the scales whose steps are equal or nearest to those of the file."""
    step, _ = weight.step_and_offset()

    def step_of(log_scale):
        return kernel.quantizer.grid(kernel.kernel.value, bits, tf.constant(log_scale)).step.numpy()

    unit = step_of(np.zeros(kernel.log_scale.shape, "float32"))
    with np.errstate(divide="ignore", invalid="ignore"):  # no scale gives a step <= 0
        start = np.log(step.astype("float64") / unit).astype("float32")
        spacing = np.maximum(np.spacing(np.abs(start)), 2.0**-25)
    # `exp` of the rounded logarithm may miss a step by some units in the last place, so the
    # neighbours are tried, too.
    best, least = start, np.full(start.shape, np.inf)
    for ulps in range(-SEARCHED_ULPS, SEARCHED_ULPS + 1):
        candidate = (start + ulps * spacing).astype("float32")
        error = np.abs(step_of(candidate) - step)
        best, least = np.where(error < least, candidate, best), np.minimum(error, least)
    return best


def _on_range(kernel, bits, weight):
    """The levels of the file, with extreme values from which the quantizer computes its grid.

    A `MinMaxQuantizer` computes step and offset from the extreme values of a kernel. Its outermost
    levels differ from these by rounding, so extreme values are searched near the levels. If the
    range of a kernel is below a hundredth of its magnitude, there may be none; then levels differ
    in the last place.
    """
    levels, codes = weight.array(), weight.codes()
    step, offset = weight.step_and_offset()

    def near(level):
        ulps = sorted(range(-SEARCHED_ULPS, SEARCHED_ULPS + 1), key=abs)
        return [_stored(kernel, level + each * np.spacing(level)) for each in ulps]

    for low, high in itertools.product(near(levels.min()), near(levels.max())):
        grid = kernel.quantizer.grid(tf.stack([low, high]), bits)
        if (grid.step.numpy() == step).all() and (grid.offset.numpy() == offset).all():
            levels = np.where(codes == codes.min(), low, levels)
            return np.where(codes == codes.max(), high, levels)
    return levels
