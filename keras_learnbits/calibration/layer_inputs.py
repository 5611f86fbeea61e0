"""What a layer multiplies with its kernel: input vectors, and the kernel as matrices."""

import keras
import numpy as np
import tensorflow as tf

# Largest number of inputs per output for which a Gram matrix is computed: 200 MB in float64.
MOST_INPUTS = 5000
CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D)
DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
# Subclasses that compute something else with their inputs.
OTHERS = (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)


def has_vectors(layer):
    """Whether a layer's outputs are products of vectors of its inputs with its one kernel.

    These are dense layers, and convolutions without groups along one and two axes, also depthwise
    ones, of up to `MOST_INPUTS` inputs, with trained scales.
    """
    if len(layer.quantized_kernels) != 1 or isinstance(layer, OTHERS):
        return False
    (kernel,) = layer.quantized_kernels.values()
    if kernel.log_scale is None:  # a grid that follows the kernel changes while it is rounded
        return False
    if isinstance(layer, keras.layers.Dense):
        return kernel.kernel.shape[0] <= MOST_INPUTS
    if getattr(layer, "data_format", None) != "channels_last":
        return False
    if isinstance(layer, CONVOLUTIONS):
        return layer.groups == 1 and np.prod(kernel.kernel.shape[:-1]) <= MOST_INPUTS
    return isinstance(layer, DEPTHWISE)


def gram_matrices(layer, inputs):
    """`sum x x^T` over the vectors `x` that a layer multiplies with its kernel.

    Args:
        layer: A built layer for which `has_vectors` is true.
        inputs: Tensor, a batch of inputs of the layer.

    Returns:
        Float32 tensor of shape `(groups, fan_in, fan_in)`: one group per channel of a depthwise
        convolution, otherwise one.
    """
    inputs = tf.cast(inputs, tf.float32)
    if isinstance(layer, keras.layers.Dense):
        vectors = tf.reshape(inputs, [1, -1, inputs.shape[-1]])
    else:
        patches = _patches(layer, inputs)
        if isinstance(layer, DEPTHWISE):
            channels = inputs.shape[-1]
            patches = tf.reshape(patches, [-1, patches.shape[-1] // channels, channels])
            vectors = tf.transpose(patches, [2, 0, 1])
        else:
            vectors = tf.reshape(patches, [1, -1, patches.shape[-1]])
    return tf.matmul(vectors, vectors, transpose_a=True)


def _patches(layer, inputs):
    """The inputs of each output of a convolution, shape `(batch, rows, columns, fan_in)`."""
    size, strides, dilation = layer.kernel_size, layer.strides, layer.dilation_rate
    padding = layer.padding
    if padding == "causal":
        inputs = tf.pad(inputs, [[0, 0], [dilation[0] * (size[0] - 1), 0], [0, 0]])
        padding = "valid"
    if inputs.shape.rank == 3:
        inputs, size, strides, dilation = inputs[:, None], (1, *size), (1, *strides), (1, *dilation)
    return tf.image.extract_patches(
        inputs, [1, *size, 1], [1, *strides, 1], [1, *dilation, 1], padding.upper()
    )


def as_matrices(layer, kernel):
    """A kernel, or an array of its shape, as matrices of shape `(groups, fan_in, outputs)`."""
    if isinstance(layer, DEPTHWISE):
        *_, channels, multiplier = kernel.shape
        return kernel.reshape(-1, channels, multiplier).transpose(1, 0, 2)
    return kernel.reshape(1, -1, kernel.shape[-1])


def from_matrices(layer, matrices, shape):
    """The inverse of `as_matrices`.

    Args:
        layer: The layer of the kernel.
        matrices: Array of shape `(groups, fan_in, outputs)`.
        shape: Shape of the kernel.
    """
    if isinstance(layer, DEPTHWISE):
        matrices = matrices.transpose(1, 0, 2)
    return matrices.reshape(shape)
