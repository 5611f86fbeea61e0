"""HGQ2's dense and convolutional layers, weights only, in place of Keras's.

Depthwise convolutions and attention stay as they are: it has fewer kernels to round than we have.
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
# What shares a bit-width: the axes along which bit-widths differ.
SHARED = {
    "layer": {"heterogeneous_axis": ()},
    "channel": {"heterogeneous_axis": (-1,)},
    "weight": {"homogeneous_axis": ()},
}


def twin(layer, price=1e-6, per="layer", bits=8, integer_bits=None):
    """The layer in HGQ2, or a copy of it as it is; for `keras.models.clone_model`.

    Args:
        layer: A Keras layer.
        price: What a bit of each of the layer's weights costs in loss.
        per: What has a bit-width of its own: `"layer"`, output `"channel"` or `"weight"`.
        bits: Where bit-widths start, the sign left out.
        integer_bits: Where the place of the binary point starts; None where it covers the
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

    `b + 1` bits a weight, none where `b` is 0; and the map of bit-widths and binary points, at its
    entropy. Or else, without a map, all weights on the grid of the finest, as wide as they need.

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
