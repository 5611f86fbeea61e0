"""The published method, equation by equation, against NumPy and Keras's own layers."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from thorough import thorough

import keras_learnbits as klb
from keras_learnbits.bit_gradients import Paper
from keras_learnbits.layers.discovery import quantized_kernels
from keras_learnbits.training.objective import BitObjective

L1, L2, RATE = 0.5, 1e-3, 0.1


@pytest.fixture
def kernel():
    layer = klb.LearnedBitDense(4, bits=3, kernel_quantizer="min_max")
    layer.build((None, 30))
    return layer.quantized_kernels["kernel"]


@pytest.fixture
def model():
    """A model of two layers, with 4 and 6 bits, that learns as published."""
    inputs = keras.Input((6,))
    settings = {"max_bits": 8, "kernel_quantizer": "min_max"}
    x = klb.LearnedBitDense(8, activation="relu", bits=4, name="hidden", **settings)(inputs)
    x = klb.LearnedBitDense(2, bits=6, name="head", **settings)(x)
    return compiled(klb.LearnedBitModel(inputs, x))


def compiled(model, **settings):
    settings = {"quantization_reg": L1, "bit_reg": L2, **settings}
    model.compile(keras.optimizers.SGD(RATE), "mse", bit_gradient="paper", **settings)
    return model


def grid_of(w, bits):
    """Equation 1 in NumPy: lowest level, step, codes and levels, with `2^B - 1` in the divisor."""
    w = w.astype("float64")
    step = (w.max() - w.min()) / (2**bits - 1)
    codes = np.round((w - w.min()) / step)
    return step, codes, w.min() + step * codes


def float_twin(model, quantized=False):
    """The same net of Keras layers, with the float kernels or with the quantized ones."""
    twin = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(8, activation="relu"), keras.layers.Dense(2)]
    )
    for kernel, layer in zip(quantized_kernels(model), twin.layers, strict=True):
        layer.kernel.assign(kernel.quantized() if quantized else kernel.kernel)
        layer.bias.assign(kernel.layer.bias)
    return twin


def loss_and_gradients(twin, x, y):
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.square(twin(x) - y))
    return float(loss), [g.numpy() for g in tape.gradient(loss, twin.trainable_variables)]


def train_one_step(model, data):
    return {k: v[0] for k, v in model.fit(*data, batch_size=64, verbose=0).history.items()}


def test_equation_1_rounds_to_a_grid_from_the_least_to_the_greatest_weight(kernel):
    expected = grid_of(kernel.kernel.numpy(), bits=3)[2]
    np.testing.assert_allclose(kernel.quantized(), expected, rtol=1e-5, atol=1e-6)


def test_equation_2_is_half_the_squared_error_and_pulls_weights_to_their_levels(kernel):

    w = kernel.kernel.numpy().astype("float64")
    levels = grid_of(w, bits=3)[2]
    with tf.GradientTape() as tape:
        error = BitObjective("levels", "squared").quantization_error([kernel])
    np.testing.assert_allclose(error, 0.5 * np.sum((levels - w) ** 2), rtol=1e-5)
    np.testing.assert_allclose(tape.gradient(error, kernel.kernel.value), w - levels, atol=1e-6)


def test_the_printed_derivative_is_that_of_the_bits_times_ln_2(kernel):
    w = kernel.kernel.numpy().astype("float64")
    step, codes, levels = grid_of(w, bits=3)
    printed = np.sum((levels - w) * -step * codes)
    np.testing.assert_allclose(Paper.error_slope(kernel), np.log(2) * printed, rtol=1e-4)


def test_the_derivative_is_exactly_zero_on_the_grid_while_a_bit_fewer_costs(kernel):
    """The reviewer's remark: on the grid the price alone decides, whatever the effect of a bit."""
    weights = tf.constant(np.random.default_rng(0).integers(0, 8, (30, 4)) / 7, "float32")
    kernel.kernel.assign(weights)
    kernel.kernel.assign(kernel.quantized())
    assert float(Paper.error_slope(kernel)) == 0.0
    assert float(kernel.squared_error()) == 0.0
    assert float(kernel.squared_error_at(tf.constant(2.0))) > 0.1


def test_equation_4_takes_the_tasks_loss_at_the_float_weights(model, data):
    kernels = quantized_kernels(model)
    bits = [int(k.integer_bits()) for k in kernels]
    errors = [
        grid_of(k.kernel.numpy(), b)[2] - k.kernel.numpy()
        for k, b in zip(kernels, bits, strict=True)
    ]
    error = 0.5 * sum(np.sum(e**2) for e in errors)
    penalty = sum(2**b for b in bits)
    task, _ = loss_and_gradients(float_twin(model), *data)
    logs = train_one_step(model, data)
    np.testing.assert_allclose(logs["task_loss"], task, rtol=1e-5)
    np.testing.assert_allclose(logs["quantization_error"], error, rtol=1e-4)
    np.testing.assert_allclose(logs["bit_penalty"], penalty)
    np.testing.assert_allclose(logs["loss"], task + L1 * error + L2 * penalty, rtol=1e-5)


def test_equation_5_moves_weights_by_the_task_and_the_error_and_bits_by_a_sign(model, data):
    kernels = quantized_kernels(model)
    before = [(k.kernel.numpy().astype("float64"), int(k.integer_bits())) for k in kernels]
    _, gradients = loss_and_gradients(float_twin(model), *data)
    train_one_step(model, data)
    for kernel, (w, bits), by_task in zip(kernels, before, gradients[::2], strict=True):
        step, codes, levels = grid_of(w, bits)
        expected = w - RATE * by_task - RATE * L1 * (w - levels)
        np.testing.assert_allclose(kernel.kernel, expected, atol=1e-6)
        printed = np.sum((levels - w) * -step * codes)
        gradient = RATE * L1 * printed + RATE * L2 * 2**bits
        assert float(kernel.bits) == bits - np.sign(gradient)


@pytest.mark.parametrize(("dead_zone", "bits"), [(0.01, 3.0), (0.02, 4.0), *thorough((0.0, 3.0))])
def test_bits_stay_where_their_gradient_is_in_the_dead_zone(dead_zone, bits, make_model, data):
    """The price's gradient of a layer of 4 bits is `1e-3 ln(2) 2^4 = 0.011`."""
    model = make_model(bits=4, kernel_quantizer="min_max")
    optimizer = klb.SignSGD(1.0, dead_zone=dead_zone)
    compiled(model, quantization_reg=0.0, bit_optimizer=optimizer)
    train_one_step(model, data)
    assert float(quantized_kernels(model)[0].bits) == bits


def test_bits_do_not_see_the_task(make_model, data):
    x, y = data
    ends = []
    for factor in (1.0, -100.0):
        keras.utils.set_random_seed(1)
        model = compiled(make_model(bits=4, kernel_quantizer="min_max"))
        train_one_step(model, (x, factor * y))
        ends.append([float(k.bits) for k in quantized_kernels(model)])
    assert ends[0] == ends[1]


def test_weights_off_their_grid_stay_off_it(model, data):
    train_one_step(model, data)
    assert all(float(k.squared_error()) > 1e-4 for k in quantized_kernels(model))


def test_its_defaults_are_the_published_ones(make_model):
    model = make_model()
    model.compile("sgd", "mse", bit_gradient="paper")
    settings = {k: v for k, v in model.bit_settings.items() if k != "bit_gradient"}
    assert settings == {
        "bit_reg": 1e-6,
        "quantization_reg": 1e-3,
        "bit_penalty": "levels",
        "quantization_error": "squared",
    }
    assert float(model.optimizer.bit_optimizer.learning_rate) == 1.0


def test_evaluate_and_predict_use_the_quantized_weights_also_while_it_trains(model, data):
    seen = []

    class Evaluate(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            twin = float_twin(self.model, quantized=True)
            seen.append((logs["val_task_loss"], loss_and_gradients(twin, *data)[0]))

    model.fit(*data, validation_data=data, epochs=2, verbose=0, callbacks=[Evaluate()])
    np.testing.assert_allclose(*np.transpose(seen), rtol=1e-5)
    twin = float_twin(model, quantized=True)
    np.testing.assert_allclose(model.predict(data[0], verbose=0), twin(data[0]), atol=1e-5)
    assert np.abs(float_twin(model)(data[0]) - twin(data[0])).max() > 1e-3


def test_every_file_and_the_bit_table_hold_the_quantized_weights(model, data, tmp_path):
    model.fit(*data, verbose=0)
    twin = float_twin(model, quantized=True)
    klb.save_packed(model, tmp_path / "model.safetensors")
    arrays = klb.load_packed(tmp_path / "model.safetensors", into=keras.models.clone_model(model))
    for kernel, layer in zip(quantized_kernels(model), twin.layers, strict=True):
        (found,) = [a for n, a in arrays.items() if n.startswith(kernel.name()) and a.ndim == 2]
        np.testing.assert_array_equal(found, layer.kernel)
    rows = klb.bit_table(model).rows
    for row, kernel in zip(rows, quantized_kernels(model), strict=True):
        w = kernel.kernel.numpy().astype("float64")
        error = np.sum((grid_of(w, row.bits)[2] - w) ** 2) / np.sum(w**2)
        np.testing.assert_allclose(row.error, error, rtol=1e-3)
    plain = klb.to_keras(model)
    np.testing.assert_allclose(plain(data[0]), twin(data[0]), atol=1e-6)


def test_a_saved_model_keeps_its_float_weights_and_goes_on_in_the_same_way(model, data, tmp_path):
    train_one_step(model, data)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for ours, theirs in zip(quantized_kernels(loaded), quantized_kernels(model), strict=True):
        np.testing.assert_array_equal(ours.kernel, theirs.kernel)
    assert train_one_step(loaded, data) == train_one_step(model, data)
    for ours, theirs in zip(loaded.weights, model.weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_wrapped_layer_trains_at_its_float_kernels():
    x = np.random.default_rng(0).normal(size=(8, 5, 3)).astype("float32")
    recurrent = keras.layers.GRU(4)
    inputs = keras.Input((5, 3))
    plain = keras.Model(inputs, recurrent(inputs))
    model = klb.to_learned_bits(plain, bits=1, kernel_quantizer="min_max")
    compiled(model)
    task = float(np.mean(np.square(plain(x))))
    np.testing.assert_allclose(
        train_one_step(model, (x, np.zeros((8, 4))))["task_loss"], task, rtol=1e-5
    )


@pytest.mark.thorough
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_it_trains_in_mixed_precision(policy, make_model, data):
    keras.config.set_dtype_policy(policy)
    model = compiled(make_model(bits=1, kernel_quantizer="min_max"))
    task, _ = loss_and_gradients(float_twin(model), *data)
    np.testing.assert_allclose(train_one_step(model, data)["task_loss"], task, rtol=0.02)


@pytest.mark.thorough
def test_it_learns_the_same_on_two_replicas(strategy, make_model, data):
    def train():
        model = make_model(bits=4, kernel_quantizer="min_max")
        compiled(model, bit_optimizer=klb.SignSGD(0.25))
        model.fit(*data, batch_size=16, shuffle=False, verbose=0)
        return [tf.convert_to_tensor(v.value).numpy() for v in model.trainable_variables]

    one = train()
    keras.utils.set_random_seed(1)
    with strategy.scope():
        two = train()
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_student_is_trained_at_its_float_weights(make_model, data):
    student = make_model(bits=1, kernel_quantizer="min_max")
    teacher = make_model(bits=8)
    distiller = klb.LearnedBitDistiller(
        teacher,
        student,
        keras.distillation.LogitsDistillation(loss=keras.losses.MeanSquaredError(reduction=None)),
        student_loss_weight=1.0,
    )
    compiled(distiller)
    task, _ = loss_and_gradients(float_twin(student), *data)
    np.testing.assert_allclose(train_one_step(distiller, data)["task_loss"], task, rtol=1e-5)
