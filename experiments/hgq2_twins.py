"""HGQ2's dense and convolutional layers, weights only, one bit-width a kernel; for overhead.py.

Depthwise convolutions and attention stay as they are: it has fewer kernels to round than we have.
"""

import keras
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


def twin(layer):
    """The layer in HGQ2, or a copy of it as it is; for `keras.models.clone_model`."""
    config = layer.get_config()
    if type(layer) not in TAKEN:
        return type(layer).from_config(config)
    cls, names = TAKEN[type(layer)]
    weights = QuantizerConfig(
        "kbi",
        "weight",
        k0=1,
        b0=8,
        i0=0,
        overflow_mode="SAT_SYM",
        round_mode="RND",
        bc=MinMax(0, 16),
        br=MonoL1(1e-6),
        heterogeneous_axis=(),
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
