"""Models are packed, and loaded from packed files."""

import functools
import gzip
import math

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packing import assert_same_bits, assert_same_predictions, disturb, quantized_arrays
from thorough import thorough

import keras_learnbits as klb
from keras_learnbits.export.packed import load_packed, load_packed_model, save_packed
from keras_learnbits.layers.discovery import quantized_kernels

L = keras.layers

# A function of a layer's settings to a layer, and the shape of its input.
LAYERS = {
    "dense": (functools.partial(klb.LearnedBitDense, 3), (5,)),
    "einsum dense": (
        functools.partial(
            klb.LearnedBitEinsumDense, "abc,cde->abde", output_shape=(None, 2, 3), bias_axes="de"
        ),
        (7, 5),
    ),
    "embedding": (functools.partial(klb.LearnedBitEmbedding, 9, 3), (6,)),
    "conv 1d": (functools.partial(klb.LearnedBitConv1D, 6, 3), (8, 4)),
    "conv 2d": (functools.partial(klb.LearnedBitConv2D, 6, 3, groups=2), (8, 8, 4)),
    "conv 3d": (functools.partial(klb.LearnedBitConv3D, 3, 2), (5, 5, 5, 2)),
    "conv 1d transpose": (functools.partial(klb.LearnedBitConv1DTranspose, 3, 3), (5, 4)),
    "conv 2d transpose": (functools.partial(klb.LearnedBitConv2DTranspose, 3, 3), (5, 5, 4)),
    "conv 3d transpose": (functools.partial(klb.LearnedBitConv3DTranspose, 3, 2), (3, 3, 3, 2)),
    "depthwise 1d": (
        functools.partial(klb.LearnedBitDepthwiseConv1D, 3, depth_multiplier=2),
        (8, 3),
    ),
    "depthwise 2d": (
        functools.partial(klb.LearnedBitDepthwiseConv2D, 3, depth_multiplier=2),
        (8, 8, 3),
    ),
    "separable 1d": (functools.partial(klb.LearnedBitSeparableConv1D, 5, 3), (8, 3)),
    "separable 2d": (functools.partial(klb.LearnedBitSeparableConv2D, 5, 3), (8, 8, 3)),
    "lstm": (lambda **settings: klb.LearnedBitWrapper(L.LSTM(3), **settings), (5, 4)),
    "both ways": (
        lambda **settings: klb.LearnedBitWrapper(L.Bidirectional(L.GRU(3)), **settings),
        (5, 4),
    ),
    "block": (
        lambda **settings: klb.LearnedBitWrapper(
            keras.Sequential([L.Dense(4), L.BatchNormalization(), L.Dense(2)]), **settings
        ),
        (5,),
    ),
}
QUANTIZERS = {
    "scale a channel": "learned_scale",
    "one scale": klb.LearnedScaleQuantizer(per_channel=False),
    "min and max": "min_max",
}
every_layer_and_quantizer = pytest.mark.parametrize(
    ("name", "quantizer"),
    [
        *((name, "scale a channel") for name in LAYERS),
        ("dense", "one scale"),
        ("dense", "min and max"),
        *thorough(
            *((name, "one scale") for name in LAYERS if name != "dense"),
            *((name, "min and max") for name in LAYERS if name != "dense"),
        ),
    ],
)


def model_of(name, quantizer="scale a channel", bits=3):
    make, shape = LAYERS[name]
    layer = make(bits=bits, max_bits=16, kernel_quantizer=QUANTIZERS[quantizer])
    inputs = keras.Input(shape)
    return klb.LearnedBitModel(inputs, layer(inputs))


KERNEL_NAMES = {"kernel", "recurrent_kernel", "embeddings", "depthwise_kernel", "pointwise_kernel"}


def assert_kernels_come_back(arrays, model):
    found = [array for name, array in arrays.items() if name.rpartition("/")[2] in KERNEL_NAMES]
    expected = quantized_arrays(model)
    assert len(found) == len(expected)
    for array, other in zip(found, expected, strict=True):
        assert_same_bits(array, other)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@every_layer_and_quantizer
def test_what_is_packed_is_what_the_model_computes_with_bit_for_bit(name, quantizer, path):
    model = model_of(name, quantizer)
    disturb(model)
    save_packed(model, path)
    arrays = load_packed(path)
    assert_kernels_come_back(arrays, model)
    # The others come in the model's order.
    others = [
        array for name, array in arrays.items() if name.rpartition("/")[2] not in KERNEL_NAMES
    ]
    own = {id(v) for k in quantized_kernels(model) for v in (k.kernel, k.bits, k.log_scale)}
    expected = [variable for variable in model.weights if id(variable) not in own]
    for array, variable in zip(others, expected, strict=True):
        assert_same_bits(array, variable.numpy())


@every_layer_and_quantizer
def test_a_model_that_is_filled_predicts_what_the_packed_one_does(name, quantizer, path):
    model, other = model_of(name, quantizer), model_of(name, quantizer, bits=7)
    disturb(model)
    disturb(other, seed=1)
    save_packed(model, path)
    arrays = load_packed(path, into=other)
    assert arrays.keys() == load_packed(path).keys()
    for ours, theirs in zip(quantized_arrays(model), quantized_arrays(other), strict=True):
        assert_same_bits(ours, theirs)
    assert_same_predictions(model, other)
    assert klb.bit_table(other).packed_bytes == klb.bit_table(model).packed_bytes


@pytest.mark.parametrize(
    "name",
    ["conv 2d", "both ways", *thorough(*(n for n in LAYERS if n not in ("conv 2d", "both ways")))],
)
def test_a_model_is_made_from_a_file_that_has_its_config(name, path):
    model = model_of(name)
    disturb(model)
    save_packed(model, path, include_config=True)
    other = load_packed_model(path)
    assert type(other) is type(model)
    assert not other.compiled
    assert_same_predictions(model, other)


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("quantizer", ["scale a channel", *thorough("one scale", "min and max")])
def test_each_bit_width_comes_back(bits, quantizer, path):
    model = model_of("dense", quantizer, bits)
    disturb(model)
    save_packed(model, path)
    other = model_of("dense", quantizer)
    assert_kernels_come_back(load_packed(path, into=other), model)
    assert_kernels_come_back(load_packed(path), other)
    assert float(other.layers[-1].bits) == bits


@pytest.mark.thorough
@settings(max_examples=60, deadline=None, derandomize=True, database=None,
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(
    shape=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    bits=st.integers(1, 16),
    quantizer=st.sampled_from(sorted(QUANTIZERS)),
    scale=st.floats(-6, 6),
    shift=st.sampled_from([0.0, 0.1, 3.0]),
    seed=st.integers(0, 2**16),
)
def test_kernels_of_any_shape_scale_and_width_come_back(
    tmp_path_factory, shape, bits, quantizer, scale, shift, seed
):
    path = tmp_path_factory.mktemp("packed") / "model.safetensors"
    rank = len(shape) - 2
    inputs = keras.Input([9] * rank + [shape[-2]])
    convolution = [None, klb.LearnedBitConv1D, klb.LearnedBitConv2D][rank]
    settings = {"bits": bits, "max_bits": 16, "kernel_quantizer": QUANTIZERS[quantizer]}
    if rank:
        layers = [convolution(shape[-1], shape[:-2], **settings) for _ in range(2)]
    else:
        layers = [klb.LearnedBitDense(shape[-1], **settings) for _ in range(2)]
    model, other = (klb.LearnedBitModel(inputs, layer(inputs)) for layer in layers)
    (kernel,) = quantized_kernels(model)
    rng = np.random.default_rng(seed)
    kernel.kernel.assign(10.0**scale * (shift + rng.normal(size=shape)))
    kernel.fit_scale()
    save_packed(model, path)
    assert_kernels_come_back(load_packed(path, into=other), model)
    assert_kernels_come_back(load_packed(path), other)


def deep_net():
    """20 kernels and 100 other weights."""
    inputs = x = keras.Input((16, 16, 8))
    for index in range(19):
        x = klb.LearnedBitConv2D(8, 3, padding="same", bits=1, name=f"block{index}_conv")(x)
        x = L.BatchNormalization(name=f"block{index}_norm")(x)
    x = klb.LearnedBitDense(10, bits=1, name="head")(L.Flatten()(x))
    return klb.LearnedBitModel(inputs, x)


def small_net():
    inputs = keras.Input((8, 8, 1))
    x = klb.LearnedBitConv2D(32, 3, bits=1, activation="relu", name="conv")(inputs)
    x = klb.LearnedBitDense(64, bits=2, name="dense1")(L.Flatten()(x))
    return klb.LearnedBitModel(inputs, klb.LearnedBitDense(10, bits=1, name="dense2")(x))


@pytest.mark.parametrize("make", [small_net, *thorough(deep_net)])
@pytest.mark.parametrize("include_config", [False, True])
def test_the_file_is_as_small_as_the_table_says(make, include_config, path):
    model = make()
    save_packed(model, path, include_config=include_config)
    table = klb.bit_table(model)
    by_hand = (
        sum(math.ceil(row.weights * row.bits / 8) + 4 * row.shape[-1] for row in table.rows)
        + 4 * table.float_parameters
    )
    assert table.packed_bytes == by_hand
    excess = path.stat().st_size - by_hand
    if make is small_net or not include_config:
        assert 0 < excess <= max(0.02 * by_hand, 2048)
    if make is small_net and not include_config:
        assert excess < 600


def test_gzip_finds_little_more_to_take_away(path):
    model = small_net()
    save_packed(model, path)
    content = path.read_bytes()
    packed = gzip.compress(content)
    assert len(packed) > 0.93 * len(content)
    path.write_bytes(gzip.decompress(packed))
    assert_kernels_come_back(load_packed(path), model)


@pytest.mark.parametrize("make", [small_net, *thorough(deep_net)])
def test_the_same_model_packs_to_the_same_bytes(make, path, tmp_path):
    model = make()
    save_packed(model, path, include_config=True)
    again = tmp_path / "again.safetensors"
    save_packed(model, again, include_config=True)
    assert path.read_bytes() == again.read_bytes()


def test_floats_are_halved_and_rounded_on_request_and_scalars_are_not(path):
    x = inputs = keras.Input((6,))
    for _ in range(2):
        x = L.LayerNormalization()(klb.LearnedBitDense(64, bits=1)(x))
    model = klb.LearnedBitModel(inputs, x)
    disturb(model)
    save_packed(model, path)
    whole, exact = path.stat().st_size, load_packed(path)
    save_packed(model, path, float_dtype="bfloat16")
    rounded = load_packed(path)
    assert whole - path.stat().st_size == pytest.approx(2 * 6 * 64, abs=32)
    assert_kernels_come_back(rounded, model)
    for name, array in exact.items():
        if "kernel" not in name:
            bits = array.view("uint32").astype("uint64")
            nearest_even = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
            assert_same_bits(rounded[name], nearest_even.astype("uint32").view("float32"))


def test_integers_and_booleans_are_stored_as_they_are(path):
    class Counter(L.Layer):
        def build(self, input_shape):
            self.count = self.add_weight((3,), dtype="int64", trainable=False, name="count")
            self.flags = self.add_weight((5,), "zeros", dtype="bool", trainable=False, name="flags")

        def call(self, x):
            return x

    def make():
        return klb.LearnedBitSequential([keras.Input((4,)), klb.LearnedBitDense(2), Counter()])

    model, other = make(), make()
    model.layers[1].count.assign([-1, 2**62, 7])
    model.layers[1].flags.assign([True, False, True, True, False])
    save_packed(model, path, float_dtype="bfloat16")
    arrays = load_packed(path, into=other)
    found = {name.rpartition("/")[2]: array for name, array in arrays.items()}
    assert found["count"].dtype == "int64"
    assert found["count"].tolist() == [-1, 2**62, 7]
    assert found["flags"].dtype == "bool"
    assert found["flags"].tolist() == [True, False, True, True, False]
    np.testing.assert_array_equal(other.layers[1].count, [-1, 2**62, 7])
