"""Handlers with which hls4ml converts the layers that `to_fixed_point` makes."""

import functools

import numpy as np

from keras_learnbits.export._extra import import_extra
from keras_learnbits.export.fixed_point import FixedPoint, Padding


@functools.cache
def register_handlers():
    """Registers handlers of `FixedPoint` and `Padding`, once."""
    base, conv = import_extra(
        "hls4ml.converters.keras_v3._base", "hls4ml.converters.keras_v3.conv", extra="hardware"
    )

    # hls4ml registers a handler when its class is made, for the classes in `handles`.
    class FixedPointHandler(base.KerasV3LayerHandler):
        handles = (f"{FixedPoint.__module__}.{FixedPoint.__name__}",)

        def handle(self, layer, in_tensors, out_tensors):
            # One type for each number: hls4ml removes the bits that a number cannot have. With one
            # type for all numbers it removes too many: `_produce_kif` in bit_exact.py takes the
            # maxima of all bits and of integer bits, which may belong to different numbers.
            shape = (1, *out_tensors[0].shape[1:])
            return {
                "class_name": "FixedPointQuantizer",
                "mask_kbi": tuple(np.full(shape, i, "int16") for i in layer.fixed_point_type()),
                "SAT": "SAT",
                "RND": "RND",  # halves are rounded up, as `floor(x + 0.5)` does
                "fusible": None,
                "overrides": {},
            }

    class PaddingHandler(base.KerasV3LayerHandler):
        # Padding is a depthwise convolution with ones, for which hls4ml can pad exactly.
        handles = (f"{Padding.__module__}.{Padding.__name__}",)

        def handle(self, layer, in_tensors, out_tensors):
            *sizes, channels = in_tensors[0].shape[1:]
            ones = (1,) * len(sizes)
            kernel = np.ones((*ones, channels, 1), "float32")
            config = conv.gen_conv_config(
                in_shape=tuple(in_tensors[0].shape[1:]), out_shape=tuple(out_tensors[0].shape[1:]),
                ker_px_shape=ones, strides=ones, data_format="channels_last", padding="valid",
                name=layer.name,
            )  # fmt: skip
            names = [("pad_left", "pad_right")]
            if len(sizes) == 2:
                names.insert(0, ("pad_top", "pad_bottom"))
            for pair, numbers in zip(names, layer.padding, strict=True):
                config.update(zip(pair, numbers, strict=True))
            return config | {
                "class_name": f"DepthwiseConv{len(sizes)}D",
                "data_format": "channels_last",
                "bias_data": None,
                "use_bias": False,
                "weight_data": kernel,
                "depthwise_data": kernel,
                "depth_multiplier": 1,
            }
