import keras
import numpy as np
import pytest
import tensorflow as tf
from thorough import thorough

import keras_learnbits as klb
from keras_learnbits import SignSGD
from keras_learnbits.layers.discovery import quantized_kernels


def test_sign_sgd_moves_by_exactly_the_step_whatever_the_size_of_the_gradient():
    variable = keras.Variable([1.0, 1.0, 1.0])
    SignSGD(0.125).apply([keras.ops.array([1e-20, -1e20, 0.0])], [variable])
    np.testing.assert_array_equal(variable, [0.875, 1.125, 1.0])


def test_sign_sgd_ignores_gradients_that_are_no_numbers():
    variable = keras.Variable([1.0, 1.0])
    SignSGD(0.5).apply([keras.ops.array([float("nan"), 1.0])], [variable])
    np.testing.assert_array_equal(variable, [1.0, 0.5])


def test_the_dead_zone_holds_variables_with_small_gradients():
    variable = keras.Variable([1.0, 1.0])
    SignSGD(0.5, dead_zone=0.1).apply([keras.ops.array([0.1, 0.11])], [variable])
    np.testing.assert_array_equal(variable, [1.0, 0.5])


def test_a_growing_dead_zone_ends_the_movement():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.3, 1, 2.0, staircase=True)
    variable, optimizer = keras.Variable(0.0), SignSGD(1.0, dead_zone=schedule)
    for _ in range(5):
        optimizer.apply([keras.ops.array(-1.0)], [variable])
    assert float(variable) == 2.0  # dead zones 0.3, 0.6, 1.2, ...


def test_momentum_takes_the_sign_of_the_running_mean():
    variable, optimizer = keras.Variable(0.0), SignSGD(1.0, momentum=0.75)
    gradients, mean, expected = [4.0, -1.0, -1.0, -9.0], 0.0, 0.0
    for gradient in gradients:
        optimizer.apply([keras.ops.array(gradient)], [variable])
        mean = 0.75 * mean + 0.25 * gradient
        expected -= np.sign(mean)
    assert float(variable) == expected == -2.0  # three steps down, one up


def test_momentum_neither_moves_a_variable_without_gradient_nor_takes_up_nan():
    variable, optimizer = keras.Variable(0.0), SignSGD(1.0, momentum=0.75)
    for gradient in (4.0, 0.0, float("nan"), 4.0):
        optimizer.apply([keras.ops.array(gradient)], [variable])
    assert float(variable) == -2.0


@pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan")])
def test_a_momentum_out_of_range_is_refused(momentum):
    with pytest.raises(ValueError, match="`momentum`.*Received: momentum="):
        SignSGD(momentum=momentum)


def test_a_negative_dead_zone_is_refused():
    with pytest.raises(ValueError, match="`dead_zone`.*Received: dead_zone=-1"):
        SignSGD(dead_zone=-1)


@pytest.mark.parametrize(
    "dead_zone", [0.25, keras.optimizers.schedules.ExponentialDecay(0.3, 1, 2.0)]
)
def test_sign_sgd_survives_its_config(dead_zone):
    optimizer = SignSGD(0.25, momentum=0.5, dead_zone=dead_zone)
    config = keras.saving.serialize_keras_object(optimizer)
    copy = keras.saving.deserialize_keras_object(config)
    assert isinstance(copy, SignSGD)
    assert keras.saving.serialize_keras_object(copy) == config


def test_the_optimizer_of_a_model_speaks_of_the_weights(make_model, data):
    model = make_model()
    model.compile(
        keras.optimizers.Adam(0.01),
        "mse",
        bit_optimizer=SignSGD(0.05),
        bit_gradient="straight_through",
    )
    model.fit(*data, epochs=2, batch_size=16, verbose=0)
    assert float(model.optimizer.learning_rate) == np.float32(0.01)
    assert int(model.optimizer.iterations) == 8
    model.optimizer.learning_rate = 0.002
    assert float(model.optimizer.weight_optimizer.learning_rate) == np.float32(0.002)
    assert float(model.optimizer.bit_optimizer.learning_rate) == np.float32(0.05)


def train_without_prices(model, data, optimizer):
    model.compile(optimizer, "mse", quantization_reg=0.0, bit_reg=0.0)
    model.fit(*data, epochs=3, verbose=0)


def test_weight_decay_acts_on_weights_and_neither_on_scales_nor_on_bits(make_model, data):
    model = make_model()
    x, y = data
    zero = (np.zeros_like(x), np.zeros_like(y))  # no gradients, only decay
    before = {v.path: v.numpy() for v in model.variables}
    train_without_prices(model, zero, keras.optimizers.AdamW(0.01, weight_decay=0.1))
    for kernel in quantized_kernels(model):
        for variable in (kernel.log_scale, kernel.bits):
            np.testing.assert_array_equal(variable, before[variable.path])
        shrunk = np.abs(kernel.kernel.numpy()) / np.abs(before[kernel.kernel.path])
        np.testing.assert_allclose(shrunk, (1 - 0.001) ** 6, rtol=1e-4)


@pytest.mark.thorough
def test_the_users_exclusions_from_weight_decay_stay(make_model, data):
    optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_names=["kernel"])
    model = make_model()
    before = [k.kernel.numpy() for k in quantized_kernels(model)]
    x, y = data
    train_without_prices(model, (np.zeros_like(x), np.zeros_like(y)), optimizer)
    for old, kernel in zip(before, quantized_kernels(model), strict=True):
        np.testing.assert_array_equal(old, kernel.kernel)


def test_scales_are_trained_with_the_users_learning_rate(make_model, data):
    model = make_model(bits=2)
    before = quantized_kernels(model)[0].log_scale.numpy()
    model.compile(keras.optimizers.Adam(0.01), "mse")
    model.fit(*data, batch_size=64, verbose=0)  # Adam's first step is the learning rate
    moved = np.abs(quantized_kernels(model)[0].log_scale.numpy() - before)
    np.testing.assert_allclose(moved[moved > 0], 0.01, rtol=1e-2)
    assert moved.max() > 0
    model.optimizer.learning_rate = 0.0
    before = quantized_kernels(model)[0].log_scale.numpy()
    model.fit(*data, batch_size=64, verbose=0)
    np.testing.assert_array_equal(quantized_kernels(model)[0].log_scale, before)


@pytest.mark.parametrize("clipping", ["global_clipnorm", *thorough("clipnorm", "clipvalue")])
def test_clipping_bounds_the_weights_step_and_not_that_of_the_bits(clipping, make_model, data):
    model = make_model()
    before = {v.path: v.numpy() for v in model.trainable_variables}
    model.compile(
        keras.optimizers.SGD(1.0, **{clipping: 1e-6}), "mse", bit_reg=1.0,
        bit_optimizer=SignSGD(0.25), bit_gradient="straight_through",
    )  # fmt: skip
    model.fit(*data, batch_size=64, verbose=0)
    for kernel in quantized_kernels(model):
        assert float(kernel.bits) == before[kernel.bits.path] - 0.25
        assert 0 < np.abs(kernel.kernel.numpy() - before[kernel.kernel.path]).max() <= 1.1e-6


@pytest.mark.thorough
def test_averaging_acts_on_weights_and_scales_and_leaves_the_bits_alone(make_model, data):
    ends = []
    for averaging in ({}, {"use_ema": True, "ema_momentum": 0.5}):
        keras.utils.set_random_seed(1)
        model = make_model()
        optimizer = keras.optimizers.Adam(0.01, **averaging)
        model.compile(
            optimizer,
            "mse",
            bit_reg=1.0,
            bit_optimizer=SignSGD(0.25),
            bit_gradient="straight_through",
        )
        model.fit(*data, batch_size=16, epochs=1, shuffle=False, verbose=0)
        ends.append(quantized_kernels(model)[0])
    plain, averaged = ends
    assert float(plain.bits) == float(averaged.bits) == 7.0
    for name in ("kernel", "log_scale"):
        assert np.abs(getattr(plain, name) - getattr(averaged, name)).max() > 1e-4


@pytest.mark.thorough
def test_scales_follow_a_schedule_in_step_with_the_weights(make_model, data):
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([0], [0.0, 0.1])
    model = make_model(bits=2)
    kernel = quantized_kernels(model)[0]
    before = kernel.kernel.numpy(), kernel.log_scale.numpy()
    model.compile(keras.optimizers.Adam(schedule), "mse")
    model.fit(*data, batch_size=64, verbose=0)
    np.testing.assert_array_equal(kernel.kernel, before[0])
    np.testing.assert_array_equal(kernel.log_scale, before[1])
    model.fit(*data, batch_size=64, verbose=0)
    assert np.abs(kernel.kernel - before[0]).max() > 0
    assert np.abs(kernel.log_scale - before[1]).max() > 0


def test_gradient_accumulation_delays_the_weights_and_not_the_bits(make_model, data):
    model = make_model()
    before = [k.kernel.numpy() for k in quantized_kernels(model)]
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=4)
    model.compile(
        optimizer, "mse", bit_reg=1.0, bit_optimizer=SignSGD(0.25), bit_gradient="straight_through"
    )
    x, y = data
    model.fit(x[:48], y[:48], batch_size=16, verbose=0)
    for old, kernel in zip(before, quantized_kernels(model), strict=True):
        np.testing.assert_array_equal(old, kernel.kernel)
        assert float(kernel.bits) == 8 - 3 * 0.25
    model.fit(x[48:], y[48:], batch_size=16, verbose=0)
    assert np.abs(before[0] - quantized_kernels(model)[0].kernel.numpy()).max() > 0


def test_a_multi_optimizer_is_refused(make_model):
    optimizers = keras.optimizers
    nested = optimizers.MultiOptimizer(optimizers.OptimizerMap(optimizers.SGD()))
    with pytest.raises(ValueError, match="must be a single one.*Received: optimizer="):
        make_model().compile(nested, "mse")


def test_a_train_step_that_gives_bits_no_gradient_is_told_so(data):
    class Own(klb.LearnedBitSequential):
        def train_step(self, batch):
            x, y = batch
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True))
            variables = self.trainable_variables
            self.optimizer.apply_gradients(
                zip(tape.gradient(loss, variables), variables, strict=True)
            )
            return {"loss": loss}

    model = Own([keras.Input((6,)), klb.LearnedBitDense(2, name="head")])
    model.compile("adam", "mse")
    with pytest.raises(ValueError, match=r"must call `super\(\).train_step`.*head/bits"):
        model.fit(*data, verbose=0)


@pytest.mark.parametrize(
    "optimizer",
    [
        keras.optimizers.AdamW(1.0, weight_decay=0.5),
        keras.optimizers.Muon(1.0, adam_weight_decay=0.5),
    ],
    ids=lambda each: each.name,
)
def test_scales_without_gradients_stay_with_optimizers_that_decay_weights(optimizer):
    layer = klb.LearnedBitConv1D(2, 3)
    model = klb.LearnedBitSequential([keras.Input((5, 3)), layer])
    model.compile(optimizer, "mse")
    (kernel,) = quantized_kernels(model)
    kernel.log_scale.assign(-2 * np.ones(kernel.log_scale.shape))
    variables = model.trainable_variables
    for _ in range(3):
        model.optimizer.apply([tf.zeros(each.shape) for each in variables], variables)
    np.testing.assert_allclose(kernel.log_scale, -2.0, rtol=1e-6)


def test_an_optimizer_that_cannot_be_made_from_its_config_is_refused(make_model):
    class Boosted(keras.optimizers.SGD):
        def __init__(self, rate):
            super().__init__(2 * rate)

    with pytest.raises(ValueError, match="updated by a copy.*of class Boosted"):
        make_model().compile(Boosted(0.01), "mse")
