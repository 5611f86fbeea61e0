"""The magnitude of a model's inputs, from the layers that they pass first.

Random inputs that test a model must reach its layers as real ones do. Normal numbers of variance 1
are almost black images for a model that begins with `Rescaling(1 / 255)` or `Normalization`: its
predictions are then the same whatever else the images show, and so are those of a wrong copy.
"""

import keras
import numpy as np

from keras_learnbits._keras import calls, is_graph, symbolic_inputs
from keras_learnbits.layers.activation import LearnedBitActivation
from keras_learnbits.layers.traversal import layers_inside

AFFINE = (keras.layers.Rescaling, keras.layers.Normalization)
# Layers that return their input in inference.
INACTIVE = (
    keras.layers.Dropout,
    keras.layers.SpatialDropout1D,
    keras.layers.SpatialDropout2D,
    keras.layers.GaussianDropout,
    keras.layers.GaussianNoise,
    keras.layers.AlphaDropout,
    keras.layers.ActivityRegularization,
    keras.layers.Identity,
)
AUGMENTING = (
    keras.layers.RandomFlip,
    keras.layers.RandomRotation,
    keras.layers.RandomTranslation,
    keras.layers.RandomZoom,
    keras.layers.RandomContrast,
    keras.layers.RandomBrightness,
)
# Distance of the two inputs from which the slope of a layer is computed. It is large so that layers
# for pixels have a slope in half precision, too.
SPAN = 256.0


def first_layers(model, dtypes):
    """The layers that set the range of each input of a model.

    Args:
        model: A built Keras model. Of one with a custom `call`, the order of the calls is unknown,
            so all its rescaling and normalizing layers are taken to come first, in the order of
            their attributes. Its inputs of integers, which may be indices, have no such layers.
        dtypes: List of the names of the inputs' dtypes.

    Returns:
        List of a list of layers for each input: rescaling and normalizing ones in the order of
        their calls, and the `LearnedBitActivation` that follows, if there is one.
    """
    if is_graph(model) and symbolic_inputs(model) is not None:
        return [_chain(model, tensor) for tensor in model.inputs]
    affine = [layer for layer in layers_inside(model) if isinstance(layer, AFFINE)]
    return [affine if "float" in dtype else [] for dtype in dtypes]


def input_for(values, layers, dtype="float64"):
    """The input that first layers turn into given values.

    Args:
        values: Array of normal numbers, of the input's shape.
        layers: List of layers, as `first_layers` returns it.
        dtype: Dtype of the result. Values are rounded to integers and limited to those that exist.

    Returns:
        Array of the same shape. Before a `LearnedBitActivation`, three times the standard
        deviation is the largest value that it can represent.

    Examples:
        >>> input_for(np.array([-1.0, 0.0, 0.5]), [keras.layers.Rescaling(1 / 256, offset=-1)])
        array([  0., 256., 384.])
        >>> input_for(np.array([-1.0, 0.0, 0.5]), [keras.layers.Rescaling(1 / 256)], "uint8")
        array([  0,   0, 128], dtype=uint8)
    """
    values = np.asarray(values, "float64")
    for layer in reversed(layers):
        if isinstance(layer, LearnedBitActivation):
            step, offset, max_code = map(float, layer.grid())
            values = values * step * max(-offset, offset + max_code) / 3
        elif _takes(layer, values.shape):
            low, high = (_output(layer, np.full(values.shape, x)) for x in (0.0, SPAN))
            slope = (high - low) / SPAN
            values = (values - low) / np.where(np.isfinite(slope) & (slope != 0), slope, 1.0)
    dtype = np.dtype(dtype)
    if dtype.kind in "iu":
        values = np.rint(values).clip(np.iinfo(dtype).min, np.iinfo(dtype).max)
    return values.astype(dtype)


def _takes(layer, shape):
    """Whether an affine layer maps a shape to itself.

    In a custom `call` it may be for an inner tensor, or not built because it is never called.
    """
    if not isinstance(layer, keras.layers.Normalization):
        return True
    try:
        return layer.built and np.broadcast_shapes(layer.mean.shape, shape) == shape
    except ValueError:
        return False


def _output(layer, values):
    output = layer(keras.ops.convert_to_tensor(values, "float32"))
    return np.asarray(keras.ops.convert_to_numpy(output), "float64")


def _chain(graph, tensor):
    """The first layers of one input tensor of a graph."""
    chain = []
    while True:
        users = [call for call in calls(graph) if any(each is tensor for each in call.inputs)]
        if len(users) != 1 or len(users[0].inputs) != 1:
            return chain
        ((layer, _, outputs),) = users
        if is_graph(layer):
            return chain + _chain(layer, layer.inputs[0])
        if isinstance(layer, LearnedBitActivation):
            return [*chain, layer] if layer.is_fitted() else chain
        if isinstance(layer, AFFINE):
            chain.append(layer)
        elif not isinstance(layer, (*INACTIVE, *AUGMENTING)):
            return chain
        tensor = outputs[0]
