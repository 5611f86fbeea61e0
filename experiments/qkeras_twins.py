"""Replaces Keras's dense and convolutional layers by QKeras's, with kernels of 4 fixed bits.

They are those of `qkeras-v3`, the fork for Keras 3. Attention is not replaced.
"""

import keras
import qkeras

CONVOLUTION = "kernel_size strides padding dilation_rate activation use_bias"
TAKEN = {
    keras.layers.Dense: (qkeras.QDense, "kernel", "units activation use_bias"),
    keras.layers.Conv2D: (qkeras.QConv2D, "kernel", f"filters {CONVOLUTION}"),
    keras.layers.DepthwiseConv2D: (qkeras.QDepthwiseConv2D, "depthwise", CONVOLUTION),
}


def twin(layer):
    """QKeras's layer for a Keras layer, or an unchanged copy; for `keras.models.clone_model`.

    Args:
        layer: A Keras layer.
    """
    config = layer.get_config()
    if type(layer) not in TAKEN:
        return type(layer).from_config(config)
    cls, kernel, names = TAKEN[type(layer)]
    quantizer = {f"{kernel}_quantizer": qkeras.quantized_bits(4, 0, alpha="auto")}
    return cls(**{name: config[name] for name in names.split()}, name=layer.name, **quantizer)
