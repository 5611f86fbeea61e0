"""A stored kernel decodes to the weights that the layer computes with."""

import keras
import numpy as np
import pytest

import keras_learnbits as klb
from keras_learnbits.export.packed.weights import packed_weights

LAYERS = {
    "dense": (lambda **bits: klb.LearnedBitDense(5, **bits), (None, 7), (1, 5)),
    "conv": (lambda **bits: klb.LearnedBitConv2D(4, 3, **bits), (None, 8, 8, 2), (1, 1, 1, 4)),
    "depthwise": (
        lambda **bits: klb.LearnedBitDepthwiseConv1D(3, **bits), (None, 8, 6), (1, 6, 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("bits", [1, 3, 16])
@pytest.mark.parametrize("quantizer", ["learned_scale", "min_max"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_stored_kernel_decodes_to_the_quantized_one(name, quantizer, bits):
    make, input_shape, scale_shape = LAYERS[name]
    layer = make(bits=bits, max_bits=16, kernel_quantizer=quantizer)
    layer.build(input_shape)
    (kernel,) = layer.quantized_kernels.values()
    stored = kernel.stored()
    assert (stored.name, stored.bits) == (layer.name, bits)
    assert stored.codes.dtype == np.int32
    assert 0 <= stored.codes.min() <= stored.codes.max() <= stored.max_code == 2**bits - 1
    np.testing.assert_array_equal(stored.levels, kernel.quantized())
    expected = scale_shape if quantizer == "learned_scale" else (1,) * len(scale_shape)
    assert stored.step.shape == stored.offset.shape == expected
    assert stored.is_mid_rise == kernel.quantizer.is_mid_rise
    turned = stored.moved(np.transpose)
    np.testing.assert_array_equal(turned.levels, kernel.quantized().numpy().T)
    assert (
        stored.code_bytes
        == packed_weights(keras.Sequential([layer]), "float32")[0].data["codes"].nbytes
    )


def test_a_file_goes_by_the_numbers_and_the_table_by_what_the_quantizer_says():
    """Weights from -1 to 1 have a mid-rise grid by chance, and may lose it in the next step."""
    layer = klb.LearnedBitDense(2, bits=2, kernel_quantizer="min_max", use_bias=False)
    model = keras.Sequential([keras.Input((2,)), layer])
    layer.kernel.assign([[-1.0, 0.2], [0.1, 1.0]])
    assert layer.quantized_kernels["kernel"].stored().is_mid_rise
    assert packed_weights(model, "float32")[0].data["scales"].nbytes == 4
    assert klb.bit_table(model).rows[0].scale_bytes == 8
