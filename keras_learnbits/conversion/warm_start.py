"""`warm_start`: initializes a model with the weights of a trained float model."""

from keras_learnbits.layers.compute_scope import keeping_scales
from keras_learnbits.layers.discovery import quantized_kernels
from keras_learnbits.layers.float_weights import assign_all, float_weights
from keras_learnbits.layers.traversal import finalize_inside


def warm_start(model, float_model):
    """Copies the weights of a float model to a learned-bit model, and fits the scales to them.

    Layers are matched by name; bit-widths do not change.

    Args:
        model: A built Keras model with learned-bit layers.
        float_model: A built Keras model with the same layers, quantized or not.

    Raises:
        ValueError: A layer with weights is in one model only, or weights differ in shape. Then the
            model does not change.

    Examples:
        >>> plain = keras.Sequential([keras.Input((8,)), keras.layers.Dense(2, name="head")])
        >>> model = keras.Sequential(
        ...     [keras.Input((8,)), keras_learnbits.LearnedBitDense(2, name="head")])
        >>> warm_start(model, plain)
        >>> kernel = model.layers[0].quantized_kernels["kernel"].kernel
        >>> bool(np.all(kernel == plain.layers[0].kernel))
        True
    """
    ours, theirs = _weights_by_layer(model), _weights_by_layer(float_model)
    if not ours or ours.keys() != theirs.keys():
        raise ValueError(
            "A warm start needs two built models whose layers with weights have the same names. "
            f"Received: only in model: {sorted(ours.keys() - theirs.keys())}, "
            f"only in float_model: {sorted(theirs.keys() - ours.keys())}"
        )
    for name in ours:
        shapes, their_shapes = ([v.shape for v in side[name]] for side in (ours, theirs))
        if shapes != their_shapes:
            raise ValueError(
                "A warm start needs layers whose weights have the same shapes. "
                f"Received: {shapes} in model and {their_shapes} in float_model, layer {name!r}"
            )
    with keeping_scales():
        for name, variables in ours.items():
            assign_all(variables, theirs[name])
    finalize_inside(model)
    for kernel in quantized_kernels(model):
        kernel.fit_scale()


def _weights_by_layer(model):
    """Dictionary of the name of each layer with weights to its weights, without bits and scales."""
    weights = {layer.name: float_weights(layer) for layer in model.layers}
    return {name: variables for name, variables in weights.items() if variables}
