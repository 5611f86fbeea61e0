"""What the exporters share: a model as a function of its kernels, and kernels as integers.

Converters fold constants: a batch norm into the kernel before it, a transposition into the
kernel itself. Integers would be lost, or would have to be found again. So a model is converted
with its quantized kernels among its *inputs*, where no converter can touch them; then an exporter
puts integers, and what decodes them, in the place of each such input.
"""

from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_learnbits.conversion import plain_copy
from keras_learnbits.layers.tensors import quantized_kernels, unique_names


class KernelCodes(NamedTuple):
    """A quantized kernel, in three arrays of one shape.

    Attributes:
        name: Name of the kernel, as in the bit table.
        bits: Its bit-width.
        codes: Int32 array of integers in `0..2**bits - 1`.
        step: Float32 array, the distance of two levels.
        offset: Float32 array; a level is `step * (code + offset)`.
    """

    name: str
    bits: int
    codes: np.ndarray
    step: np.ndarray
    offset: np.ndarray

    @property
    def levels(self):
        """The quantized weights, float32: bit for bit those that the model uses."""
        return self.step * (self.codes.astype("float32") + self.offset)

    @property
    def is_mid_rise(self):
        """Whether 0 is half-way between two levels, as with `LearnedScaleQuantizer`."""
        return bool(np.all(self.offset == -0.5 * (2**self.bits - 1)))

    def moved(self, move):
        """The kernel after a function of arrays that only moves elements, as a transposition."""
        return self._replace(codes=move(self.codes), step=move(self.step), offset=move(self.offset))


def kernel_codes(kernel, name):
    """The `KernelCodes` of a `QuantizedKernel`."""
    codes, grid = kernel.encode()
    step, offset = (np.broadcast_to(part.numpy(), codes.shape) for part in grid[:2])
    return KernelCodes(name, int(kernel.integer_bits()), codes.numpy(), step, offset)


def shared(array):
    """An array cut to size 1 along the axes where it is constant.

    Examples:
        >>> shared(np.array([[1, 2], [1, 2]])).tolist()
        [[1, 2]]
    """
    for axis in range(array.ndim):
        first = array.take([0], axis)
        array = first if np.array_equal(np.broadcast_to(first, array.shape), array) else array
    return array


def narrowest(bits, widths):
    """The least width of an integer type that holds codes of so many bits.

    Examples:
        >>> narrowest(3, widths=(2, 4, 8, 16))
        4
    """
    return min(width for width in widths if width >= bits)


def function_of_kernels(model, input_signature=None):
    """A model's predictions as a function of its inputs and its quantized kernels.

    Args:
        model: A built Keras model with learned-bit layers and float32 kernels. Where it computes
            in a mixed precision, the function computes in float32.
        input_signature: Structure of `tf.TensorSpec`, the argument that the model is called
            with; by default that of the model's symbolic inputs.

    Returns:
        A `tf.function` of as many tensors as there are inputs and kernels, a list of their
        `tf.TensorSpec`s, and a dictionary of the names of the kernels' to `KernelCodes`.

    Raises:
        ValueError: The model has no learned-bit layer or cannot be converted to plain Keras
            layers; it has no symbolic inputs and there is no `input_signature`; a kernel is not
            of float32.
    """
    plain, copies = plain_copy(model, float32=True)
    kernels = quantized_kernels(model)
    variables = [copies[id(kernel.kernel)] for kernel in kernels]
    for kernel, name in zip(kernels, unique_names(kernels), strict=True):
        if kernel.kernel.dtype != "float32":
            raise ValueError(
                "Exports need float32 kernels; build the model with the policy float32 or a mixed "
                f"one and set its weights. Received: {kernel.kernel.dtype!r} in {name!r}"
            )
    if input_signature is None:
        if not hasattr(plain, "inputs"):
            raise ValueError(
                "A model with a `call` of its own needs an `input_signature`, a structure of "
                f"`tf.TensorSpec` that it can be called with. Received: model={model.name!r}"
            )
        # A Sequential that was built and not yet called has no `input`.
        given = plain.inputs[0] if isinstance(plain, keras.Sequential) else plain.input
        input_signature = keras.tree.map_structure(
            lambda x: tf.TensorSpec(x.shape, x.dtype, x.name), given
        )
    codes = {
        f"learned_bits_kernel_{number}": kernel_codes(kernel, name)
        for number, (kernel, name) in enumerate(zip(kernels, unique_names(kernels), strict=True))
    }
    specs = keras.tree.flatten(input_signature)
    number_of_inputs = len(specs)
    specs += [tf.TensorSpec(each.codes.shape, name=name) for name, each in codes.items()]

    @tf.function(input_signature=specs)
    def predict(*tensors):
        inputs = keras.tree.pack_sequence_as(input_signature, tensors[:number_of_inputs])
        values = zip(variables, tensors[number_of_inputs:], strict=True)
        with keras.StatelessScope(list(values), initialize_variables=False):
            return plain(inputs, training=False)

    return predict, specs, codes
