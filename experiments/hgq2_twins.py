"""Replaces Keras's dense and convolutional layers by HGQ2's, which quantize weights only.

Depthwise convolutions and attention are not replaced, so HGQ2 rounds fewer kernels than this
library.
"""

import keras
import numpy as np
from hgq.config import QuantizerConfig
from hgq.constraints import MinMax
from hgq.layers import QConv2D, QDense
from hgq.regularizers import MonoL1

TAKEN = {
    keras.layers.Dense: (QDense, "units activation use_bias"),
    keras.layers.Conv2D: (
        QConv2D,
        "filters kernel_size strides padding dilation_rate groups activation use_bias",
    ),
}
# Unit that shares a bit-width, and the axes along which bit-widths differ.
SHARED = {
    "layer": {"heterogeneous_axis": ()},
    "channel": {"heterogeneous_axis": (-1,)},
    "weight": {"homogeneous_axis": ()},
}


def twin(layer, price=1e-6, per="layer", bits=8, integer_bits=None):
    """HGQ2's layer for a Keras layer, or an unchanged copy; for `keras.models.clone_model`.

    Args:
        layer: A Keras layer.
        price: Price of one more bit in all of the layer's weights, in loss.
        per: Unit that has one bit-width: `"layer"`, output `"channel"` or `"weight"`.
        bits: Initial bit-widths, without the sign.
        integer_bits: Initial position of the binary point; by default the one that covers the
            layer's largest weight.
    """
    config = layer.get_config()
    if type(layer) not in TAKEN:
        return type(layer).from_config(config)
    cls, names = TAKEN[type(layer)]
    if integer_bits is None:
        integer_bits = np.ceil(np.log2(np.abs(layer.kernel).max()))
    widths = {"layer": 1, "channel": layer.kernel.shape[-1], "weight": np.size(layer.kernel)}
    weights = QuantizerConfig(
        "kbi",
        "weight",
        k0=1,
        b0=bits,
        i0=float(integer_bits),
        overflow_mode="SAT_SYM",
        round_mode="RND",
        bc=MinMax(0, 16),
        br=MonoL1(price / widths[per]),
        **SHARED[per],
    )
    return cls(
        **{name: config[name] for name in names.split()},
        name=layer.name,
        kq_conf=weights,
        bq_conf=QuantizerConfig("dummy", "bias"),
        enable_iq=False,
        enable_oq=False,
        enable_ebops=False,
    )


def stored_bits(layer):
    """Bits that a layer's kernel takes in a file, as few as its bit-widths allow.

    The smaller one of two encodings is counted. The first has `b + 1` bits per weight, none where
    `b` is 0, and the map of bit-widths and binary points at its entropy. The second has no map, and
    stores all weights on the finest grid, with as many bits as the largest one needs.

    Args:
        layer: A layer that `twin` made.

    Returns:
        Number of bits.
    """
    quantizer, shape = layer.kq.quantizer, layer.kernel.shape
    bits, point = (
        np.broadcast_to(np.asarray(each), shape).ravel() for each in (quantizer.b, quantizer.i)
    )
    codes = np.sum(np.where(bits > 0, bits + 1, 0))
    kinds = np.stack([bits, np.where(bits > 0, point, 0)])
    per_width = np.asarray(quantizer.b).size / bits.size
    _, counts = np.unique(kinds, axis=1, return_counts=True)
    shares = counts / counts.sum()
    entropy = -np.sum(counts * np.log2(shares)) * per_width
    with_map = codes + entropy + 10 * len(counts)
    if not codes:
        return 10
    kernel = np.asarray(layer.kq(layer.kernel)).ravel()
    finest = (bits - point)[bits > 0].max()
    largest = np.abs(np.round(kernel * 2.0**finest)).max()
    without_map = 10 + bits.size * (1 + np.ceil(np.log2(largest + 1)))
    return int(np.ceil(min(with_map, without_map)))
