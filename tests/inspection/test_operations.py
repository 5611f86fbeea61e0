"""Multiply-accumulates and bit operations, against counting by hand and by XLA."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_learnbits as klb
from keras_learnbits.inspection.operations import operations

L = keras.layers


def macs_of(model):
    return [each.macs for each in operations(model).values()]


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (lambda: klb.LearnedBitDense(5), (7,), 35),
        (lambda: klb.LearnedBitDense(5), (4, 7), 4 * 35),
        (lambda: klb.LearnedBitConv2D(5, 3, strides=2, padding="same"), (7, 6, 2), 4 * 3 * 90),
        (lambda: klb.LearnedBitConv2D(6, 3, groups=2), (5, 5, 4), 9 * 9 * 2 * 6),
        (lambda: klb.LearnedBitDepthwiseConv2D(3, depth_multiplier=2), (5, 5, 4), 9 * 72),
        (lambda: klb.LearnedBitConv1DTranspose(5, 3, strides=2), (4, 2), 4 * 30),
        (lambda: klb.LearnedBitEinsumDense("abc,cd->abd", (4, 5)), (4, 7), 4 * 35),
        (lambda: klb.LearnedBitEinsumDense("abc,bcd->ad", 5), (4, 7), 4 * 7 * 5),
    ],
)
def test_each_weight_multiplies_once_for_each_position(layer, shape, expected):
    model = keras.Sequential([keras.Input(shape), layer()])
    assert macs_of(model) == [expected]


def test_xla_counts_twice_as_many_floating_point_operations():
    """XLA counts a multiplication and an addition for each multiply-accumulate."""
    model = keras.Sequential(
        [keras.Input((12, 12, 4)), klb.LearnedBitConv2D(8, 3, use_bias=False), L.Flatten(),
         klb.LearnedBitDense(10, use_bias=False)]
    )  # fmt: skip
    plain = klb.to_keras(model)
    predict = tf.function(lambda x: plain(x), jit_compile=True)
    graph = predict.get_concrete_function(tf.TensorSpec((1, 12, 12, 4))).graph
    flops = tf.compat.v1.profiler.profile(
        graph, cmd="op", options={**tf.compat.v1.profiler.ProfileOptionBuilder.float_operation(),
                                  "output": "none"},
    ).total_float_ops  # fmt: skip
    assert flops == 2 * sum(macs_of(model))


def test_a_separable_convolution_has_two_kernels_of_which_one_reads_the_input():
    model = klb.LearnedBitSequential(
        [keras.Input((6, 6, 3)), klb.LearnedBitActivation(4),
         klb.LearnedBitSeparableConv2D(5, 3)]
    )  # fmt: skip
    depthwise, pointwise = operations(model).values()
    assert (depthwise.macs, pointwise.macs) == (16 * 27, 16 * 15)
    assert depthwise.input is not None
    assert pointwise.input is None
    assert klb.bit_table(model).bit_operations is None


def net():
    inputs = keras.Input((8, 8, 3))
    x = klb.LearnedBitActivation(6)(inputs)
    x = klb.LearnedBitConv2D(4, 3, bits=3)(L.ZeroPadding2D()(x))
    x = klb.LearnedBitActivation(4)(L.ReLU()(x))
    block = klb.LearnedBitSequential(
        [keras.Input((8, 8, 4)), L.MaxPooling2D(2), L.Flatten(), klb.LearnedBitDense(2, bits=5)]
    )
    return klb.LearnedBitModel(inputs, block(x))


def test_bit_operations_are_macs_times_the_bits_of_both_operands():
    table = klb.bit_table(net())
    assert [row.macs for row in table.rows] == [64 * 108, 128]
    assert [row.input_bits for row in table.rows] == [6, 4]
    assert table.macs == 64 * 108 + 128
    assert table.bit_operations == 64 * 108 * 3 * 6 + 128 * 5 * 4
    lines = str(table).splitlines()
    assert "input bits   MACs  bit operations" in lines[0]
    assert lines[2].endswith("6  6,912         124,416")
    quantized = next(line for line in lines if line.startswith("quantized"))
    assert quantized.endswith("7,040         126,976")


def test_without_quantized_activations_the_table_is_as_before():
    model = keras.Sequential([keras.Input((4,)), klb.LearnedBitDense(2)])
    table = klb.bit_table(model)
    assert table.macs == 8
    assert table.bit_operations is None
    assert "MACs" not in str(table)


def test_a_layer_that_is_called_twice_multiplies_twice():
    inputs = keras.Input((4,))
    dense = klb.LearnedBitDense(4)
    model = klb.LearnedBitModel(inputs, dense(dense(inputs)))
    assert macs_of(model) == [32]


def test_what_is_not_known_is_left_out():
    recurrent = klb.to_learned_bits(keras.Sequential([keras.Input((5, 3)), L.LSTM(4), L.Dense(2)]))
    assert macs_of(recurrent) == [8]
    open_size = keras.Sequential([keras.Input((None, 3)), klb.LearnedBitConv1D(4, 3)])
    assert macs_of(open_size) == []
    assert klb.bit_table(open_size).macs is None
    tokens = keras.Sequential([keras.Input((5,)), klb.LearnedBitEmbedding(10, 4)])
    assert macs_of(tokens) == [0]


def test_operations_of_a_model_with_a_custom_call_are_not_known():
    class Custom(klb.LearnedBitModel):
        def __init__(self):
            super().__init__()
            self.dense = klb.LearnedBitDense(2)

        def call(self, x):
            return self.dense(x)

    model = Custom()
    model(np.ones((1, 3), "float32"))
    assert operations(model) == {}
    assert klb.bit_table(model).macs is None


def test_an_embedding_costs_no_operations():
    model = klb.LearnedBitSequential(
        [keras.Input((5,)), klb.LearnedBitEmbedding(10, 4), L.Flatten(),
         klb.LearnedBitActivation(4), klb.LearnedBitDense(2, bits=3)]
    )  # fmt: skip
    table = klb.bit_table(model)
    assert [row.bit_operations for row in table.rows] == [0, 40 * 12]


def test_counting_changes_no_automatic_names():
    model = klb.LearnedBitSequential([keras.Input((5,)), klb.LearnedBitDense(2)])
    before = keras.Model(model.inputs, model.outputs).name
    klb.bit_table(model)
    number = int(before.rpartition("_")[2]) if "_" in before else 0
    assert keras.Model(model.inputs, model.outputs).name == f"functional_{number + 1}"
