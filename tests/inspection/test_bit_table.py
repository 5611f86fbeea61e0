import keras
import numpy as np
import pytest

import keras_learnbits as klb


@pytest.fixture
def model():
    inputs = keras.Input((8, 8, 3))
    x = klb.LearnedBitConv2D(5, 3, bits=3, name="conv")(inputs)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Flatten()(x)
    x = klb.LearnedBitDense(7, bits=2.4, use_bias=False, name="fc")(x)
    return klb.LearnedBitModel(inputs, keras.layers.Dense(2)(x))


def test_every_parameter_is_counted_once_and_under_its_name(model):
    table = klb.bit_table(model)
    conv, dense = table.rows
    assert (conv.layer, conv.shape, conv.weights, conv.bits) == ("conv", (3, 3, 3, 5), 135, 3)
    assert (dense.layer, dense.weights, dense.bits) == ("fc", 180 * 7, 2)
    assert (conv.code_bytes, conv.scale_bytes) == (51, 20)  # 135 * 3 / 8 = 50.6
    assert (dense.code_bytes, dense.scale_bytes) == (315, 28)
    floats = 5 + 4 * 5 + 7 * 2 + 2  # bias, batch norm with its statistics, the plain head
    assert table.float_parameters == floats
    assert table.packed_bytes == 51 + 20 + 315 + 28 + 4 * floats
    assert table.float_bytes == 4 * (135 + 1260 + floats)
    assert table.mean_bits == (135 * 3 + 1260 * 2) / 1395
    assert table.compression == table.float_bytes / table.packed_bytes


def test_optimizer_state_and_prices_do_not_count(model):
    before = klb.bit_table(model).packed_bytes
    model.compile("adam", "mse")
    model.fit(np.ones((4, 8, 8, 3)), np.ones((4, 2)), verbose=0)
    assert klb.bit_table(model).packed_bytes == before


def test_errors_are_relative_to_the_squared_norm_of_the_kernel(model):
    row = klb.bit_table(model).rows[0]
    kernel = model.get_layer("conv").quantized_kernels["kernel"]
    w, q = kernel.kernel.numpy(), kernel.quantized().numpy()
    np.testing.assert_allclose(row.error, ((w - q) ** 2).sum() / (w**2).sum(), rtol=1e-5)


def test_the_table_prints_aligned(model):
    lines = str(klb.bit_table(model)).splitlines()
    for name in ("layer", "conv", "fc", "quantized", "float32"):
        assert any(line.startswith(name) for line in lines)
    *table, explained, summary = lines
    assert len({len(line) for line in table if not line.startswith("-")}) == 1
    assert explained.startswith("error: ")
    assert "bytes packed" in summary


def test_an_affine_grid_stores_step_and_offset():
    layer = klb.LearnedBitDense(4, kernel_quantizer="min_max", use_bias=False)
    table = klb.bit_table(keras.Sequential([keras.Input((3,)), layer]))
    assert table.rows[0].scale_bytes == 8


def test_a_shared_layer_counts_once():
    inputs = keras.Input((4,))
    layer = klb.LearnedBitDense(4)
    model = keras.Model(inputs, layer(layer(inputs)))
    assert len(klb.bit_table(model).rows) == 1


def test_layers_inside_layers_are_found():
    class Block(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.parts = [klb.LearnedBitDense(4, name="a"), klb.LearnedBitDense(4, name="b")]

        def call(self, x):
            return self.parts[1](self.parts[0](x))

    inputs = keras.Input((4,))
    model = klb.LearnedBitModel(inputs, Block()(inputs))
    assert [row.layer for row in klb.bit_table(model).rows] == ["a", "b"]


@pytest.mark.parametrize("layer", [keras.layers.Dense(2), klb.LearnedBitDense(2)])
def test_a_model_with_nothing_to_count_is_refused(layer):
    model = keras.Sequential([layer])
    if isinstance(layer, keras.layers.Dense) and not hasattr(layer, "min_bits"):
        model.build((None, 3))
    with pytest.raises(ValueError, match="`bit_table` needs a built model"):
        klb.bit_table(model)
