import inspect
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from thorough import thorough

import keras_learnbits as klb
from keras_learnbits.layers.discovery import quantized_kernels

# learned-bit layer, Keras twin, input shape, arguments
TWINS = [
    (klb.LearnedBitDense, keras.layers.Dense, (4, 5), {"units": 3, "activation": "relu"}),
    (klb.LearnedBitDense, keras.layers.Dense, (4, 2, 5), {"units": 3, "use_bias": False}),
    (
        klb.LearnedBitEinsumDense,
        keras.layers.EinsumDense,
        (4, 7, 5),
        {"equation": "abc,cde->abde", "output_shape": (None, 2, 3), "bias_axes": "de"},
    ),
    (
        klb.LearnedBitEinsumDense,
        keras.layers.EinsumDense,
        (4, 7, 5),
        {"equation": "...x,xy->...y", "output_shape": 3},
    ),
    (klb.LearnedBitEmbedding, keras.layers.Embedding, (4, 6), {"input_dim": 9, "output_dim": 3}),
    (klb.LearnedBitConv1D, keras.layers.Conv1D, (2, 8, 4), {"filters": 6, "kernel_size": 3}),
    (
        klb.LearnedBitConv1D,
        keras.layers.Conv1D,
        (2, 8, 4),
        {"filters": 6, "kernel_size": 3, "padding": "causal", "dilation_rate": 2},
    ),
    (
        klb.LearnedBitConv2D,
        keras.layers.Conv2D,
        (2, 8, 8, 4),
        {"filters": 6, "kernel_size": 3, "strides": 2, "padding": "same"},
    ),
    (
        klb.LearnedBitConv2D,
        keras.layers.Conv2D,
        (2, 8, 8, 4),
        {"filters": 6, "kernel_size": 3, "groups": 2},
    ),
    (klb.LearnedBitConv3D, keras.layers.Conv3D, (2, 5, 5, 5, 2), {"filters": 3, "kernel_size": 2}),
    (
        klb.LearnedBitConv1DTranspose,
        keras.layers.Conv1DTranspose,
        (2, 5, 4),
        {"filters": 3, "kernel_size": 3, "strides": 2},
    ),
    (
        klb.LearnedBitConv2DTranspose,
        keras.layers.Conv2DTranspose,
        (2, 5, 5, 4),
        {"filters": 3, "kernel_size": 3, "strides": 2},
    ),
    (
        klb.LearnedBitConv3DTranspose,
        keras.layers.Conv3DTranspose,
        (2, 3, 3, 3, 2),
        {"filters": 3, "kernel_size": 2},
    ),
    (
        klb.LearnedBitDepthwiseConv1D,
        keras.layers.DepthwiseConv1D,
        (2, 8, 3),
        {"kernel_size": 3, "depth_multiplier": 2},
    ),
    (
        klb.LearnedBitDepthwiseConv2D,
        keras.layers.DepthwiseConv2D,
        (2, 8, 8, 3),
        {"kernel_size": 3, "depth_multiplier": 2},
    ),
    (
        klb.LearnedBitSeparableConv1D,
        keras.layers.SeparableConv1D,
        (2, 8, 3),
        {"filters": 5, "kernel_size": 3},
    ),
    (
        klb.LearnedBitSeparableConv2D,
        keras.layers.SeparableConv2D,
        (2, 8, 8, 3),
        {"filters": 5, "kernel_size": 3},
    ),
]
IDS = [f"{twin[0].__name__}-{index}" for index, twin in enumerate(TWINS)]
every_layer = pytest.mark.parametrize(("learned", "twin", "shape", "arguments"), TWINS, ids=IDS)


def inputs_of(shape, layer_class):
    rng = np.random.default_rng(0)
    if issubclass(layer_class, keras.layers.Embedding):
        return rng.integers(0, 9, shape)
    return rng.normal(size=shape).astype("float32")


def twin_of(layer, twin_class, arguments, shape):
    """The Keras layer that holds the quantized weights."""
    twin = twin_class(**arguments)
    twin.build(shape)
    quantized = {name: kernel.quantized() for name, kernel in layer.quantized_kernels.items()}
    for variable in twin.weights:
        name = variable.name
        variable.assign(quantized[name] if name in quantized else getattr(layer, name))
    return twin


@every_layer
@pytest.mark.parametrize("quantizer", ["learned_scale", "min_max"])
def test_a_layer_computes_what_its_keras_twin_with_quantized_weights_computes(
    learned, twin, shape, arguments, quantizer
):
    layer = learned(**arguments, bits=2, kernel_quantizer=quantizer)
    x = inputs_of(shape, learned)
    outputs = layer(x)
    np.testing.assert_allclose(
        outputs, twin_of(layer, twin, arguments, shape)(x), rtol=1e-5, atol=1e-6
    )
    for kernel in quantized_kernels(layer):
        quantized = np.asarray(kernel.quantized())
        scales = 1 if kernel.log_scale is None else np.prod(kernel.log_scale.shape)
        assert len(np.unique(quantized)) <= 4 * scales
        assert np.abs(quantized - kernel.kernel.numpy()).max() > 0


@every_layer
def test_at_16_bits_a_layer_computes_what_keras_does(learned, twin, shape, arguments):
    layer = learned(**arguments, bits=16, max_bits=16)
    x = inputs_of(shape, learned)
    outputs = layer(x)
    twin = twin(**arguments)
    twin.build(shape)
    floats = [k.kernel for k in quantized_kernels(layer)]
    floats += [layer.bias] if getattr(layer, "bias", None) is not None else []
    twin.set_weights([variable.numpy() for variable in floats])
    np.testing.assert_allclose(outputs, twin(x), atol=2e-3)


@every_layer
def test_the_signature_is_that_of_keras_and_ours(learned, twin, shape, arguments):
    theirs = [
        (name, parameter.default)
        for name, parameter in inspect.signature(twin.__init__).parameters.items()
        if name not in ("self", "kwargs")
    ]
    signature = inspect.signature(learned).parameters
    actual = [(name, parameter.default) for name, parameter in signature.items()]
    ours = [("bits", 8), ("min_bits", 1), ("max_bits", 8), ("kernel_quantizer", "learned_scale")]
    assert actual[: len(theirs)] == theirs
    assert actual[len(theirs) :] == [*ours, ("kwargs", inspect.Parameter.empty)]


@every_layer
def test_config_and_saved_file_bring_back_floats_bits_and_scales(
    learned, twin, shape, arguments, tmp_path
):
    layer = learned(**arguments, bits=2.5, min_bits=2, max_bits=6, kernel_quantizer="learned_scale")
    dtype = "int32" if learned is klb.LearnedBitEmbedding else "float32"
    model = keras.Sequential([keras.Input(shape[1:], dtype=dtype), layer])
    for kernel in quantized_kernels(model):
        kernel.bits.assign(3.25)
        kernel.kernel.assign(kernel.kernel * 1.5)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for before, after in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(before, after)
    assert loaded.layers[-1].get_config() == layer.get_config()
    model.save_weights(tmp_path / "model.weights.h5")
    for kernel in quantized_kernels(loaded):
        kernel.kernel.assign(tf.zeros_like(kernel.kernel))
    loaded.load_weights(tmp_path / "model.weights.h5")
    for before, after in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(before, after)


@every_layer
@pytest.mark.parametrize("policy", ["mixed_bfloat16", *thorough("mixed_float16", "bfloat16")])
def test_half_precision_rounds_the_full_precision_levels_last(
    learned, twin, shape, arguments, policy
):
    layer = learned(**arguments, bits=3, dtype=policy)
    outputs = layer(inputs_of(shape, learned))
    compute_dtype = keras.DTypePolicy(policy).compute_dtype
    assert keras.backend.standardize_dtype(outputs.dtype) == compute_dtype
    for kernel in quantized_kernels(layer):
        quantized = kernel.used_by_layer()
        assert keras.backend.standardize_dtype(quantized.dtype) == compute_dtype
        np.testing.assert_array_equal(quantized, tf.cast(kernel.quantized(), compute_dtype))


@every_layer
def test_kernel_and_scale_get_gradients_and_bits_do_not(learned, twin, shape, arguments):
    layer = learned(**arguments, bits=3)
    x = inputs_of(shape, learned)
    layer(x)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.square(layer(x)))
    kernels = quantized_kernels(layer)
    assert all(not kernel.bits.trainable for kernel in kernels)
    for kernel in kernels:
        assert any(v is kernel.kernel for v in layer.trainable_variables)
        assert any(v is kernel.log_scale for v in layer.trainable_variables)
    sources = [v for k in kernels for v in (k.kernel, k.log_scale)]
    for gradient in tape.gradient(loss, sources):
        assert np.abs(tf.convert_to_tensor(gradient)).max() > 0


@pytest.mark.parametrize("optimizer", ["Adam", *thorough("AdamW", "SGD")])
def test_in_a_plain_keras_model_the_layer_trains_and_its_bits_stay(optimizer, data):
    layer = klb.LearnedBitDense(2, bits=3.25)
    model = keras.Sequential([keras.Input((6,)), layer])
    model.compile(getattr(keras.optimizers, optimizer)(0.03), "mse")
    before = layer.quantized_kernels["kernel"].kernel.numpy()
    losses = model.fit(*data, epochs=20, verbose=0).history["loss"]
    assert losses[-1] < losses[0] / 2
    assert float(layer.bits) == 3.25
    assert np.abs(layer.quantized_kernels["kernel"].kernel.numpy() - before).max() > 0


def test_a_layer_that_is_not_trainable_changes_nothing(make_model, data):
    model = make_model()
    model.get_layer("hidden").trainable = False
    model.compile("adamw", "mse", bit_reg=1.0)
    before = [v.numpy() for v in model.get_layer("hidden").variables]
    head = model.get_layer("head")
    bits = float(head.bits)
    model.fit(*data, epochs=2, verbose=0)
    for old, new in zip(before, model.get_layer("hidden").variables, strict=True):
        np.testing.assert_array_equal(old, new)
    assert float(head.bits) < bits


def test_regularizers_act_on_the_float_kernel():
    layer = klb.LearnedBitDense(3, bits=1, kernel_regularizer=keras.regularizers.L2(0.5))
    layer(np.ones((2, 4)))
    kernel = layer.quantized_kernels["kernel"].kernel
    np.testing.assert_allclose(layer.losses[0], 0.5 * (kernel.numpy() ** 2).sum(), rtol=1e-6)


def test_embedding_weights_given_by_the_user_are_quantized():
    weights = np.random.default_rng(0).normal(size=(9, 3)).astype("float32")
    layer = klb.LearnedBitEmbedding(9, 3, weights=[weights], bits=16, max_bits=16)
    np.testing.assert_allclose(layer(np.arange(9)), weights, atol=1e-3)


def test_einsum_scales_follow_the_axes_of_the_output():
    layer = klb.LearnedBitEinsumDense("abc,cde->abde", output_shape=(None, 2, 3))
    layer(np.ones((4, 7, 5)))
    assert layer.quantized_kernels["kernel"].log_scale.shape == (1, 2, 3)


def test_fit_scale_follows_weights_that_were_assigned():
    layer = klb.LearnedBitDense(2, bits=8)
    layer.build((None, 4))
    kernel = layer.quantized_kernels["kernel"]
    kernel.kernel.value.assign(kernel.kernel * 100)  # scales do not follow this assignment
    assert kernel.squared_error() / kernel.squared_norm() > 0.5
    kernel.fit_scale()
    assert kernel.squared_error() / kernel.squared_norm() < 1e-3


@pytest.mark.parametrize(
    "arguments",
    [
        {"bits": 0},
        {"bits": 9},
        {"bits": 17, "max_bits": 16},
        {"bits": float("nan")},
        {"bits": "8"},
        {"bits": 4, "min_bits": 5},
        {"min_bits": 6, "max_bits": 5},
        {"min_bits": 0},
        {"max_bits": 17},
        {"min_bits": 1.5},
    ],
    ids=str,
)
def test_bits_outside_their_bounds_are_refused(arguments):
    with pytest.raises(ValueError, match=r"must be (integers|a number) with .*Received: "):
        klb.LearnedBitDense(3, **arguments)


def test_lora_is_refused():
    with pytest.raises(ValueError, match="LoRA.*Received: rank=2"):
        klb.LearnedBitDense(3, lora_rank=2)
    layer = klb.LearnedBitConv2D(3, 3)
    layer.build((None, 8, 8, 3))
    with pytest.raises(ValueError, match="LoRA.*Received: rank=4"):
        layer.enable_lora(4)


@pytest.mark.parametrize(
    "policy", ["int8_from_float32", "int4_from_float32", "float8_from_float32"]
)
def test_quantized_dtype_policies_are_refused(policy):
    with pytest.raises(ValueError, match=f"float dtype policies only. Received: dtype='{policy}'"):
        klb.LearnedBitDense(3, dtype=policy)


def test_integer_kernels_are_refused():
    with pytest.raises(ValueError, match="floating-point `kernel`.*Received: dtype='int32'"):
        klb.LearnedBitDense(3, dtype="int32").build((None, 4))


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize`:UserWarning")
def test_keras_quantize_leaves_learned_bit_layers_alone(data):
    layers = [keras.Input((6,)), keras.layers.Dense(8), klb.LearnedBitDense(2)]
    model = keras.Sequential(layers)
    before = model.layers[1].quantized_kernels["kernel"].quantized()
    model.quantize("int8")
    assert model.layers[0].quantization_mode == "int8"
    np.testing.assert_array_equal(model.layers[1].quantized_kernels["kernel"].quantized(), before)


def test_an_unbuilt_layer_says_so():
    layer = klb.LearnedBitDense(3)
    for name in ("kernel", "bits"):
        with pytest.raises(AttributeError, match=f"build the layer before accessing `{name}`"):
            getattr(layer, name)


def test_the_quantization_error_pulls_weights_and_scales():
    layer = klb.LearnedBitDense(3, bits=2)
    layer.build((None, 40))
    kernel = layer.quantized_kernels["kernel"]
    variables = [kernel.kernel.value, kernel.log_scale.value]
    with tf.GradientTape() as tape:
        error = kernel.squared_error()
    to_kernel, to_scale = tape.gradient(error, variables)
    w, q = kernel.kernel.numpy(), kernel.quantized().numpy()
    np.testing.assert_allclose(to_kernel, 2 * (w - q), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(
        to_scale, 2 * ((q - w) * q).sum(axis=0, keepdims=True), rtol=1e-3, atol=1e-6
    )


def dense_layers(first_trainable=True):
    return klb.LearnedBitSequential(
        [
            keras.Input((6,)),
            klb.LearnedBitDense(3, bits=4, trainable=first_trainable),
            klb.LearnedBitDense(2, bits=4),
        ]
    )


@pytest.mark.parametrize("at_creation", [True, False])
@pytest.mark.parametrize("later", [True, False])
def test_files_of_layers_that_were_frozen_or_unfrozen_load(at_creation, later, data, tmp_path):
    model = dense_layers(at_creation)
    model.layers[0].trainable = later
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    of_weights = dense_layers()
    of_weights.load_weights(tmp_path / "model.weights.h5")
    for each in (loaded, of_weights):
        np.testing.assert_array_equal(each(data[0]), model(data[0]))
    assert loaded.layers[0].trainable == later


def test_a_clone_takes_the_weights_of_a_model_that_was_frozen(make_model, data):
    model = make_model()
    model.trainable = False
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    np.testing.assert_array_equal(clone(data[0]), model(data[0]))


@pytest.mark.parametrize("saved_frozen", [True, *thorough(False)])
def test_scales_of_a_layer_created_frozen_train_once_it_is_unfrozen(saved_frozen, data, tmp_path):
    model = dense_layers(first_trainable=False)
    if saved_frozen:
        model.save(tmp_path / "model.keras")
        model = keras.models.load_model(tmp_path / "model.keras")
    model.layers[0].trainable = True
    scales = model.layers[0].quantized_kernels["kernel"].log_scale
    before = scales.numpy()
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(*data, verbose=0)
    assert np.abs(scales.numpy() - before).min() > 0


@pytest.mark.parametrize(
    ("layer", "bits"),
    [
        (lambda **bits: klb.LearnedBitConv1D(2, 3, name="head", **bits), "[8.0]"),
        (lambda **bits: klb.LearnedBitSeparableConv1D(2, 3, name="head", **bits), "[8.0, 8.0]"),
        (lambda **bits: klb.LearnedBitActivation(name="head", **bits), "[8.0]"),
    ],
    ids=["kernel", "two kernels", "activation"],
)
def test_a_file_with_bits_beyond_the_bounds_is_refused(layer, bits, tmp_path):
    def make(**settings):
        first = klb.LearnedBitConv1D(3, 3)
        return klb.LearnedBitSequential([keras.Input((8, 6)), first, layer(**settings)])

    make(bits=8).save_weights(tmp_path / "model.weights.h5")
    model = make(bits=3, max_bits=4)
    message = re.escape(f"bits={bits} for layer 'head', with min_bits=")
    with pytest.raises(ValueError, match=message):
        model.load_weights(tmp_path / "model.weights.h5")
    found = model.layers[-1].bits
    assert all(float(each) == 3 for each in (found if isinstance(found, tuple) else (found,)))
