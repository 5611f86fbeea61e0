"""Steps that are powers of two, in kernels, activations, files and the two conversions."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from thorough import thorough

import keras_learnbits as klb
from keras_learnbits.layers.compute_scope import computing_with_float_kernels
from keras_learnbits.numerics import grids

L = keras.layers
RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 8, 8, 3)).astype("float32")
QUANTIZER = klb.LearnedScaleQuantizer(power_of_two=True)


def are_powers_of_two(steps):
    return np.all(np.frexp(steps)[0] == 0.5)


def steps_at(bits, log_scales, **arguments):
    bits, log_scales = tf.constant(float(bits)), tf.constant(log_scales, tf.float32)
    step = grids.gaussian_grid(bits)[0] * tf.exp(log_scales)
    return step, grids.power_of_two_step(step, bits, log_scales, **arguments)


@pytest.mark.parametrize("bits", [1, 4, 16])
def test_the_nearest_power_on_the_logarithmic_scale_is_found(bits):
    step, found = steps_at(bits, RNG.uniform(-40, 40, 20_000))
    assert are_powers_of_two(found.numpy())
    ratio = found.numpy().astype("float64") / step.numpy()
    np.testing.assert_array_less(np.abs(np.log2(ratio)), 0.5002)
    _, halved = steps_at(bits, [0.1, 0.9], halved=True)
    _, whole = steps_at(bits, [0.1, 0.9])
    np.testing.assert_array_equal(2 * halved, whole)


def test_steps_beyond_normal_numbers_get_the_nearest_normal_power():
    np.testing.assert_array_equal(steps_at(16, -86.0)[1], np.float32(2.0**-126))
    np.testing.assert_array_equal(steps_at(1, 88.0)[1], np.float32(2.0**127))


def test_all_programs_take_the_same_power_half_way_between_two():
    """Eagerly, in a graph, and in XLA, for neighbours of each boundary between two powers."""
    bits = 2
    boundaries = np.log(2.0 ** (np.arange(-20, 20) + 0.5) / grids.GAUSSIAN_STEPS[bits - 1])
    near = boundaries[:, None] + np.arange(-40, 41) * 2.0**-20
    log_scales = tf.constant(near.ravel(), tf.float32)

    def power(log_scale):
        step = grids.gaussian_grid(tf.constant(2.0))[0] * tf.exp(log_scale)
        return grids.power_of_two_step(step, tf.constant(2.0), log_scale)

    eager = power(log_scales)
    one_by_one = tf.map_fn(power, log_scales)
    compiled = tf.function(power, jit_compile=True)(log_scales)
    np.testing.assert_array_equal(eager, one_by_one)
    np.testing.assert_array_equal(eager, compiled)


def test_gradients_pass_straight_through_the_rounding_of_the_logarithm():
    """The derivative of the step with respect to the logarithm of the scale is the rounded step."""
    log_scale, bits = tf.Variable([0.3, -1.1]), tf.constant(3.0)
    with tf.GradientTape() as tape:
        step = grids.gaussian_grid(bits)[0] * tf.exp(log_scale)
        powers = grids.power_of_two_step(step, bits, log_scale)
    np.testing.assert_allclose(tape.gradient(powers, log_scale), powers, rtol=1e-6)


@pytest.mark.parametrize("bits", [1, 3, *thorough(2, 5, 8)])
def test_fitted_scales_are_the_best_of_all_powers_of_two(bits):
    kernel = tf.constant(RNG.normal(0, [0.01, 0.3, 7], (50, 3)), tf.float32)
    width = tf.constant(float(bits))
    log_scale = QUANTIZER.fitted_log_scale(kernel, width, (1, 3))
    error = np.square(QUANTIZER.quantize(kernel, width, log_scale) - kernel).sum(axis=0)
    codes = np.arange(2**bits) - 0.5 * (2**bits - 1)
    best = [
        min(
            np.square(column[:, None] - 2.0**power * codes).min(axis=1).sum()
            for power in range(-30, 10)
        )
        for column in kernel.numpy().T.astype("float64")
    ]
    np.testing.assert_allclose(error, best, rtol=1e-4)


def net():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3))
    x = L.Conv2D(8, 3, activation="relu", name="first")(inputs)
    x = L.DepthwiseConv2D(3, activation="relu", name="second")(x)
    return keras.Model(inputs, L.Dense(4, name="head")(L.Flatten()(x)))


def kernels_of(model):
    return [tensor for tensor in model.quantized_tensors if hasattr(tensor, "kernel")]


def steps_of(model):
    activations = [each for each in model.layers if isinstance(each, klb.LearnedBitActivation)]
    return [k.stored().step for k in kernels_of(model)], [
        each.grid().step.numpy() for each in activations
    ]


@pytest.mark.parametrize("bits", [4, *thorough(2, 8)])
def test_trained_steps_stay_powers_of_two_in_kernels_and_activations(bits, tmp_path):
    model = klb.to_learned_bits(net(), bits=bits, activations=True, power_of_two=True)
    model.compile("adam", "mse", bit_optimizer=klb.SignSGD(0.1), bit_reg=0.01)
    before = kernels_of(model)[0].log_scale.numpy()
    model.fit(X, RNG.normal(size=(64, 4)), batch_size=8, epochs=2, verbose=0)
    kernels, activations = steps_of(model)
    assert all(map(are_powers_of_two, kernels))
    assert all(map(are_powers_of_two, activations))
    assert len(activations) == 3
    assert not np.array_equal(before, kernels_of(model)[0].log_scale.numpy())  # it is trained
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), model.predict(X, verbose=0))
    klb.save_packed(model, tmp_path / "model.safetensors", include_config=True)
    packed = klb.load_packed_model(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(packed.predict(X, verbose=0), model.predict(X, verbose=0))
    plain = klb.to_keras(model)
    np.testing.assert_allclose(
        plain.predict(X, verbose=0), model.predict(X, verbose=0), rtol=1e-4, atol=1e-5
    )


def test_post_training_quantization_takes_powers_of_two():
    model = klb.quantize(
        net(), X, target_bits=3, power_of_two=True, activations=True, steps=5, verbose=0
    )
    kernels, activations = steps_of(model)
    assert all(map(are_powers_of_two, kernels))
    assert all(map(are_powers_of_two, activations))


def test_another_quantizer_is_refused():
    with pytest.raises(ValueError, match=r"`power_of_two` goes with the default.*'min_max'"):
        klb.to_learned_bits(net(), kernel_quantizer="min_max", power_of_two=True)


def test_the_default_configuration_is_that_of_earlier_versions():
    assert klb.LearnedScaleQuantizer().get_config() == {"per_channel": True}
    assert klb.LearnedScaleQuantizer() != QUANTIZER
    assert klb.LearnedScaleQuantizer.from_config(QUANTIZER.get_config()) == QUANTIZER


@pytest.mark.parametrize("signed", [False, True])
def test_activations_just_below_a_half_are_rounded_down(signed):
    """A circuit rounds the exact value, so no sum with an offset may round it first."""
    layer = klb.LearnedBitActivation(bits=8, power_of_two=True)
    low = -2.0 if signed else 0.0
    layer(np.float32([[low, 1.9]]), training=True)
    step = float(layer.grid().step)
    halves = np.arange(1, 60, dtype="float32") + np.float32(0.5)
    values = np.nextafter(halves, 0, dtype="float32") * np.float32(step)
    expected = np.floor(values.astype("float64") / step + 0.5) * step
    np.testing.assert_array_equal(layer(values[None])[0], expected)
    np.testing.assert_array_equal(layer.plain(values[None])[0], expected)


def test_fixed_point_rounds_to_the_smallest_power_of_two_that_suffices():
    for largest in (0.7, 1.0, 1.0001, 300.0, 1e-6):
        values = RNG.uniform(-largest, largest, 200).astype("float32")
        values[0] = largest
        step = 2.0 ** (np.ceil(np.log2(np.float64(np.float32(largest)))) - 7)
        expected = np.floor(values.astype("float64") / step + 0.5) * step
        found = grids.fixed_point(tf.constant(values), bits=8)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(grids.fixed_point(found, bits=8), found)
    np.testing.assert_array_equal(grids.fixed_point(tf.zeros(3), bits=8), np.zeros(3))


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_biases_are_in_fixed_point_in_training_and_after(policy):
    """The output for inputs of zeros is the bias that is added."""
    layer = klb.LearnedBitDense(
        50, kernel_quantizer=QUANTIZER, bias_initializer="normal", dtype=policy
    )
    zeros = np.zeros((1, 3), "float32")
    added = layer(zeros, training=True).numpy().astype("float32")[0]
    bias = layer.bias.numpy()
    expected = grids.fixed_point(tf.constant(bias), bits=12)
    np.testing.assert_array_equal(added, tf.cast(tf.cast(expected, layer.compute_dtype), "float32"))
    assert not np.array_equal(expected, bias)  # the variable itself is float
    free = klb.LearnedBitDense(50, bias_initializer="normal", dtype="float32")
    np.testing.assert_array_equal(free(zeros)[0], free.bias)


def test_biases_are_trained_straight_through_their_rounding():
    layer = klb.LearnedBitDense(2, kernel_quantizer=QUANTIZER, bias_initializer="normal")
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(np.zeros((3, 4), "float32")))
    np.testing.assert_array_equal(tape.gradient(loss, layer.bias.value), [3.0, 3.0])


def test_a_bias_may_be_replaced_and_deleted_as_in_keras():
    layer = klb.LearnedBitDense(2, kernel_quantizer=QUANTIZER)
    layer(np.zeros((1, 3), "float32"))
    layer.bias = np.float32([0.5, -0.25])
    np.testing.assert_array_equal(layer(np.zeros((1, 3), "float32"))[0], [0.5, -0.25])
    del layer.bias
    assert not hasattr(layer, "bias")


def test_float_references_have_float_biases():
    model = klb.to_learned_bits(net(), power_of_two=True)
    model.layers[-1].bias.assign([0.3, 0.1234567, -0.7, 1.0])
    with computing_with_float_kernels():
        found = model(np.zeros((1, 8, 8, 3), "float32"))
    np.testing.assert_allclose(found[0], [0.3, 0.1234567, -0.7, 1.0], rtol=1e-6)
