import dataclasses
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from thorough import thorough

import keras_learnbits as klb
from keras_learnbits.bit_gradients import BIT_GRADIENTS, Difference, Measured, get
from keras_learnbits.estimators.adjacent_widths import error_changes
from keras_learnbits.estimators.decisions import adjacent_gradients
from keras_learnbits.layers.discovery import quantized_kernels

ESTIMATORS = ["measured", *thorough("difference")]


def compiled(model, data, bit_gradient, **settings):
    """A model whose estimator has a state; weights do not move."""
    model.compile(
        keras.optimizers.SGD(0.0), "mse", bit_gradient=bit_gradient,
        bit_optimizer=klb.SignSGD(0.25), **settings,
    )  # fmt: skip
    model.evaluate(*data, verbose=0)
    return model


def loss_at(model, data, kernel, bits):
    """The task's loss with one kernel at another width: oracle by evaluation."""
    before = float(kernel.bits)
    kernel.bits.assign(bits)
    loss = model.evaluate(*data, verbose=0, batch_size=64, return_dict=True)["task_loss"]
    kernel.bits.assign(before)
    return loss


def step_of(model, data):
    return model.bit_step((*map(tf.constant, data), None))


def test_measured_changes_are_those_of_the_evaluated_loss(make_model, data):
    model = compiled(make_model(bits=3), data, "measured", quantization_reg=0.0)
    measured = Measured().predict(step_of(model, data)).numpy()
    for kernel, (fewer, more) in zip(quantized_kernels(model), measured, strict=True):
        bits = int(kernel.integer_bits())
        here = loss_at(model, data, kernel, bits)
        np.testing.assert_allclose(fewer, loss_at(model, data, kernel, bits - 1) - here, rtol=1e-3)
        if bits < 8:
            np.testing.assert_allclose(
                more, loss_at(model, data, kernel, bits + 1) - here, rtol=1e-3
            )
        else:
            assert more == 0


def test_a_probe_measures_the_training_loss_with_the_dropout_of_its_step(data):
    inputs = keras.Input((6,))
    x = keras.layers.BatchNormalization()(klb.LearnedBitDense(8, bits=3)(inputs))
    dropout = keras.layers.Dropout(0.5)
    model = klb.LearnedBitModel(inputs, klb.LearnedBitDense(2, bits=3)(dropout(x)))
    model.compile("sgd", "mse", quantization_reg=0.0)
    x, y = data
    start = dropout.seed_generator.state.numpy()

    def loss():
        dropout.seed_generator.state.assign(start)
        return np.mean((y - model(x, training=True).numpy()) ** 2)

    measured = Measured().predict(step_of(model, data)).numpy()
    here = loss()
    for kernel, changes in zip(quantized_kernels(model), measured, strict=True):
        for bits, change in zip((2, 4), changes, strict=True):
            kernel.bits.assign(bits)
            np.testing.assert_allclose(change, loss() - here, rtol=1e-3, atol=1e-6)
        kernel.bits.assign(3)


class AtPresentWidths(Measured):
    """Probes the present widths: a change is 0 unless something else differs from the step."""

    def probe(self, step, errors):
        change = step.loss_changes(tf.zeros((1, len(step.tensors))))
        seen = tf.constant([[True, False]] * len(step.tensors))
        return tf.where(seen, change, 0.0), seen


def test_a_probe_in_fit_differs_from_its_step_in_the_bits_only(data):
    inputs = keras.Input((6,))
    x = keras.layers.BatchNormalization()(klb.LearnedBitDense(8, bits=3)(inputs))
    outputs = klb.LearnedBitDense(2, bits=3)(keras.layers.Dropout(0.5)(x))
    model = klb.LearnedBitModel(inputs, outputs)
    estimator = AtPresentWidths(interval=1)
    model.compile("sgd", "mse", bit_gradient=estimator, bit_optimizer=klb.SignSGD(0.0))
    model.fit(*data, batch_size=16, epochs=2, verbose=0)
    estimator = model.optimizer.bit_gradient
    assert float(estimator.steps) == 8
    changes = estimator.statistics.variables.loss_changes
    np.testing.assert_allclose(changes, 0.0, atol=1e-5)


@pytest.mark.thorough
def test_state_that_moves_with_each_pass_is_not_charged_to_a_bit(data):
    """Renormalization has moving statistics in its outputs, and updates them."""
    inputs = keras.Input((6,))
    widths = {"bits": 16, "min_bits": 15, "max_bits": 16}
    x = klb.LearnedBitDense(8, **widths)(inputs)
    x = keras.layers.BatchNormalization(renorm=True)(x)
    model = klb.LearnedBitModel(inputs, klb.LearnedBitDense(2, **widths)(x))
    estimator = Measured(interval=1)
    model.compile("sgd", "mse", bit_gradient=estimator, bit_optimizer=klb.SignSGD(0.0))
    model.fit(*data, batch_size=16, epochs=2, verbose=0)
    changes = model.optimizer.bit_gradient.statistics.variables.loss_changes
    np.testing.assert_allclose(changes, 0.0, atol=1e-4)


def test_measured_changes_contain_the_quantization_error_and_not_the_price(make_model):
    zero = np.zeros((8, 6), "float32"), np.zeros((8, 2), "float32")
    model = compiled(make_model(bits=3), zero, "measured", quantization_reg=10.0, bit_reg=100.0)
    measured = Measured().predict(step_of(model, zero)).numpy()
    kernels = quantized_kernels(model)
    sizes, squared_norms = (
        np.array([k.size for k in kernels]),
        [float(k.squared_norm()) for k in kernels],
    )
    shares = sizes / sizes.sum() / squared_norms
    expected = 10.0 * shares[:, None] * error_changes(kernels).numpy()
    np.testing.assert_allclose(measured[0], expected[0], rtol=1e-3)


def test_a_prediction_by_difference_is_the_printed_formula(make_model, data):
    model = compiled(make_model(bits=3), data, "difference")
    step = step_of(model, data)
    predicted = Difference().predict(step).numpy()
    kernel = step.tensors[0]
    gradient = step.kernel_gradients[kernel].numpy()
    w = kernel.kernel.numpy()
    q, up = kernel.quantized().numpy(), kernel.quantized_at(tf.constant(4.0)).numpy()
    fisher = 64 * np.mean(gradient**2)
    expected = (gradient * (up - q)).sum()
    expected += fisher / 2 * (((up - w) ** 2).sum() - ((q - w) ** 2).sum())
    np.testing.assert_allclose(predicted[0, 1], expected, rtol=1e-3)


def test_on_grid_weights_show_their_bits_worth_to_differences_only(make_model, data):
    """The reviewer's example: kernels exactly on their 3-bit grid."""
    model = compiled(make_model(bits=3), data, "difference", quantization_reg=0.0)
    kernels = quantized_kernels(model)
    kernels[1].bits.assign(3.0)
    for kernel in kernels:
        kernel.kernel.value.assign(kernel.quantized())  # scales stay
        np.testing.assert_allclose(float(kernel.squared_error()), 0, atol=1e-10)
    changes = error_changes(kernels).numpy()
    assert (changes > 1e-3).all()  # one bit fewer raises the loss, one more does not lower it
    step = step_of(model, data)
    paper = get("paper").predict(step).numpy()
    np.testing.assert_allclose(paper, 0, atol=1e-5)
    with tf.GradientTape() as tape:
        watched = [kernel.bits.value for kernel in kernels]
        tape.watch(watched)
        error = tf.add_n([kernel.squared_error() for kernel in kernels])
    np.testing.assert_allclose(tape.gradient(error, watched), 0, atol=1e-9)
    no_gradients = {k: tf.zeros_like(g) for k, g in step.kernel_gradients.items()}
    noise = {
        k: g + 0.1 for k, g in no_gradients.items()
    }  # its squared effect is 0.01 in any direction
    for gradients, sign in ((no_gradients, 0), (noise, 1)):
        second_order = (
            Difference().predict(dataclasses.replace(step, kernel_gradients=gradients)).numpy()
        )
        if sign:
            first = np.array([
                [0.1 * (k.quantized_at(b) - k.quantized()).numpy().sum() for b in (2.0, 4.0)]
                for k in kernels
            ])  # fmt: skip
            second_order -= first
        assert (np.sign(second_order.round(9)) == sign).all()


def test_one_fewer_bit_is_taken_when_its_cost_is_below_the_price():
    cost, worth = 0.19, 0.05
    changes, prices = tf.constant([[cost, -worth]]), tf.constant([[-0.2, 0.2]])
    assert adjacent_gradients(changes, prices, [True], [True]) == [1.0]


def test_one_more_bit_is_taken_when_it_is_worth_more_than_its_price():
    changes, prices = tf.constant([[0.9, -0.21]]), tf.constant([[-0.2, 0.2]])
    assert adjacent_gradients(changes, prices, [True], [True]) == [-1.0]


def test_bits_stay_between_the_two_and_at_their_bounds():
    changes, prices = tf.constant([[0.21, -0.19], [0.0, 0.0]]), tf.constant([[-0.2, 0.2]] * 2)
    stays = adjacent_gradients(changes, prices, [True, False], [True, True])
    assert stays.numpy().tolist() == [0.0, 0.0]


def test_at_fixed_sensitivities_moves_end_where_no_single_bit_improves():
    """Brute force on small kernels: each layer's end is a minimum among its neighbours."""
    rng = np.random.default_rng(0)
    layers = []
    for size in (5, 40, 300):
        layer = klb.LearnedBitDense(1, use_bias=False)
        layer.build((None, size))
        layers.append(layer.quantized_kernels["kernel"])
        layers[-1].kernel.assign(rng.normal(size=(size, 1)))
        layers[-1].fit_scale()
    sensitivity = tf.constant([[3.0], [0.1], [0.003]])
    price = 0.2
    widths = np.arange(1, 9)
    totals = [
        each * np.array([float(k.squared_error_at(tf.constant(float(b)))) for b in widths])
        + price * widths
        for k, each in zip(layers, sensitivity.numpy()[:, 0], strict=True)
    ]

    @tf.function
    def moves():
        low = [kernel.bits.value > 1 for kernel in layers]
        high = [kernel.bits.value < 8 for kernel in layers]
        prices = tf.constant([[-price, price]] * 3)
        return adjacent_gradients(sensitivity * error_changes(layers), prices, low, high)

    for start in itertools.product((1, 4, 8), repeat=3):
        for kernel, bits in zip(layers, start, strict=True):
            kernel.bits.assign(bits)
        for _ in range(30):
            found = moves().numpy()
            if not found.any():
                break
            for kernel, move in zip(layers, found, strict=True):
                kernel.bits.assign_sub(move)
        else:
            pytest.fail("the bits still move")
        for kernel, of_kernel in zip(layers, totals, strict=True):
            end = int(kernel.bits) - 1
            assert of_kernel[end] <= min(of_kernel[max(end - 1, 0) : end + 2]) + 1e-6


class Shown(Measured):
    """An estimator whose probes return given changes of the loss."""

    def __init__(self, changes, seen):
        super().__init__(interval=1)
        self.shown = changes, seen

    def probe(self, step, errors):
        return tuple(map(tf.constant, self.shown))

    def get_config(self):
        return dict(zip(("changes", "seen"), self.shown, strict=True))


def predicted(model, kernel, bits):
    """The predicted change of a model's loss with a kernel at another width."""
    kernels, losses = model.predicted_losses()
    return losses[kernels.index(kernel), bits - 1]


def test_predictions_use_the_loss_per_error_of_probes_in_both_directions(make_model, data):
    changes, seen = [[6.0, -1.0], [-2.0, 0.0]], [[True, True], [True, False]]
    model = compiled(make_model(bits=3), data, Shown(changes, seen), bit_reg=0.0)
    first, second = quantized_kernels(model)
    fewer, more = error_changes([first]).numpy()[0]
    model.optimizer.bit_optimizer.learning_rate = 0.0
    model.fit(*data, batch_size=8, verbose=0)  # the same in all probes: there is no noise
    np.testing.assert_allclose(
        predicted(model, first, 2), (6 + 1) / (fewer - more) * fewer, rtol=1e-3
    )
    assert 0 <= predicted(model, second, 1) < 1e-6  # fewer bits lower its loss


@pytest.mark.parametrize(
    ("bits", "probed"),
    [(8, (2, 2)), (3, (2, 4)), *thorough((4, (2, 2)), (2, (1, 3)), (1, (2, 2)))],
)
def test_probes_are_at_two_bits_and_of_at_most_three_at_one_fewer_and_one_more_in_turn(
    bits, probed, make_model, data
):
    model = compiled(make_model(bits=3), data, Measured(probed_bits=2), quantization_reg=0.0)
    model.optimizer.build(model.trainable_variables)
    kernels, estimator = quantized_kernels(model), model.optimizer.bit_gradient
    for kernel in kernels:
        kernel.bits.assign(bits)
    step = step_of(model, data)
    for turn, (width, layer) in enumerate(itertools.product(probed, (0, 1))):
        estimator.steps.assign(turn * estimator.interval)
        changes, seen = map(np.asarray, estimator.probe(step, None))
        expected = np.zeros((2, 2), bool)
        expected[layer, int(width > bits)] = True
        np.testing.assert_array_equal(seen, expected)
        here, there = (loss_at(model, data, kernels[layer], b) for b in (bits, width))
        np.testing.assert_allclose(changes, expected * (there - here), rtol=1e-3, atol=1e-6)


def test_a_probe_goes_no_lower_than_the_least_bits(make_model, data):
    model = compiled(
        make_model(bits=8, min_bits=6), data, Measured(probed_bits=2), quantization_reg=0.0
    )
    model.optimizer.build(model.trainable_variables)
    estimator, kernel = model.optimizer.bit_gradient, quantized_kernels(model)[0]
    changes, _ = estimator.probe(step_of(model, data), None)
    change = loss_at(model, data, kernel, 6) - loss_at(model, data, kernel, 8)
    np.testing.assert_allclose(changes[0, 0], change, rtol=1e-2)
    assert estimator.lower_widths([kernel]).numpy() == [6]


@pytest.mark.parametrize("bits", [0, 1.5, "2"])
def test_bits_to_probe_at_that_are_no_width_are_refused(bits):
    with pytest.raises(ValueError, match=rf"`probed_bits` must be.*Received.*{bits!r}"):
        Measured(probed_bits=bits)


def test_activations_are_probed_at_one_bit_fewer(make_model, data):
    inputs = keras.Input((4,))
    x = klb.LearnedBitActivation(8)(inputs)
    model = klb.LearnedBitModel(inputs, klb.LearnedBitDense(1)(x))
    widths = Measured(probed_bits=2).lower_widths(model.quantized_tensors).numpy()
    kinds = [hasattr(tensor, "kernel") for tensor in model.quantized_tensors]
    assert sorted(zip(kinds, widths, strict=True)) == [(False, 7), (True, 2)]


def test_what_a_probe_at_two_bits_shows_is_predicted_of_other_widths(make_model, data):
    model = compiled(
        make_model(bits=6), data, Measured(1, probed_bits=2), quantization_reg=0.0, bit_reg=0.0
    )
    model.optimizer.bit_optimizer.learning_rate = 0.0
    kernel = quantized_kernels(model)[0]
    data = data[0], model.predict(data[0], verbose=0)  # fewer bits raise the loss
    added = loss_at(model, data, kernel, 2) - loss_at(model, data, kernel, 6)
    errors = {b: float(kernel.squared_error_at(tf.constant(float(b)))) for b in (2, 4, 6)}
    model.fit(*data, batch_size=64, epochs=8, verbose=0)  # one batch: there is no noise
    expected = added / (errors[2] - errors[6]) * (errors[4] - errors[6])
    np.testing.assert_allclose(predicted(model, kernel, 4), expected, rtol=1e-2)


@pytest.mark.parametrize("bit_gradient", ESTIMATORS)
def test_without_a_price_the_bits_rise_where_they_help(bit_gradient, make_model, data):
    model = compiled(make_model(), data, bit_gradient, bit_reg=0.0)
    targets = model.predict(data[0], verbose=0)  # 8 bits reach these targets, and 2 do not
    kernel = quantized_kernels(model)[0]
    kernel.bits.assign(2.0)
    model.fit(data[0], targets, batch_size=16, epochs=10, verbose=0)
    assert float(kernel.bits) > 2


@pytest.mark.parametrize("bit_gradient", ESTIMATORS)
def test_at_a_high_price_the_bits_fall_to_their_bound(bit_gradient, make_model, data):
    model = compiled(make_model(bits=4), data, BIT_GRADIENTS[bit_gradient](1), bit_reg=1e4)
    model.fit(*data, batch_size=16, epochs=8, verbose=0)
    assert [float(kernel.integer_bits()) for kernel in quantized_kernels(model)] == [1.0, 1.0]


def test_bits_of_unprobed_layers_stay(make_model, data):
    model = compiled(make_model(bits=4), data, Measured(interval=50), bit_reg=1e4)
    model.fit(*data, batch_size=16, epochs=2, verbose=0)
    first, second = quantized_kernels(model)
    assert float(first.bits) < 4
    assert float(second.bits) == 8  # its turn comes at step 50


def test_frozen_bits_are_not_probed(make_model, data):
    model = compiled(make_model(bits=4), data, Measured(interval=1), bit_reg=1e4)
    model.freeze_bits()
    model.fit(*data, batch_size=16, verbose=0)
    estimator = model.optimizer.bit_gradient
    assert float(estimator.steps) == 0
    assert not np.any(estimator.statistics.variables.error_changes)
    assert float(quantized_kernels(model)[0].bits) == 4


def test_a_probe_does_not_change_metrics_statistics_and_dropout(data):
    def trained(bit_gradient):
        keras.utils.set_random_seed(1)
        inputs = keras.Input((6,))
        x = klb.LearnedBitDense(8, min_bits=4, max_bits=4, bits=4)(inputs)
        x = keras.layers.Dropout(0.5)(keras.layers.BatchNormalization()(x))
        model = klb.LearnedBitModel(inputs, klb.LearnedBitDense(2, bits=5, min_bits=5)(x))
        model.compile("sgd", "mse", bit_gradient=bit_gradient, bit_optimizer=klb.SignSGD(0.0))
        history = model.fit(*data, batch_size=16, epochs=2, shuffle=False, verbose=0).history
        return history["loss"], [v.numpy() for v in model.variables]

    (loss, variables), (same_loss, same_variables) = map(
        trained, ("straight_through", Measured(interval=1))
    )
    assert loss == same_loss
    for a, b in zip(variables, same_variables, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.thorough
@pytest.mark.parametrize("bit_gradient", ESTIMATORS)
def test_two_replicas_learn_the_same_bits(bit_gradient, strategy, make_model, data):
    def train():
        model = make_model(bits=4)
        model.compile(
            keras.optimizers.SGD(0.01), "mse", bit_gradient=get(bit_gradient), bit_reg=0.05,
            bit_optimizer=klb.SignSGD(0.25),
        )  # fmt: skip
        model.fit(*data, batch_size=64, epochs=25, shuffle=False, verbose=0)
        return [float(tf.convert_to_tensor(k.bits.value)) for k in quantized_kernels(model)]

    one = train()
    keras.utils.set_random_seed(1)
    with strategy.scope():
        two = train()
    assert one != [4.0, 8.0]
    if bit_gradient == "measured":  # means over examples; squared gradients differ by the batch
        assert one == two
    else:
        assert two != [4.0, 8.0]


@pytest.mark.thorough
@pytest.mark.parametrize("replicas", [1, 2])
def test_bits_are_learned_where_replicas_synchronize_their_batch_norm(replicas, strategy, data):
    with strategy.scope() if replicas == 2 else tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        model = klb.LearnedBitSequential(
            [
                keras.Input((6,)),
                klb.LearnedBitDense(8, bits=4),
                keras.layers.BatchNormalization(synchronized=True),
                klb.LearnedBitDense(2, bits=4),
            ]
        )
        model.compile(
            "sgd", "mse", bit_reg=1e4, bit_optimizer=klb.SignSGD(0.25),
            bit_gradient=Measured(interval=1),
        )  # fmt: skip
    model.fit(*data, batch_size=8, epochs=3, verbose=0)
    assert all(float(tf.convert_to_tensor(k.bits.value)) < 3 for k in quantized_kernels(model))


def test_a_loaded_model_goes_on_with_what_it_has_seen(make_model, data, tmp_path):
    model = compiled(make_model(bits=4), data, Measured(interval=3), bit_reg=1e-3)
    model.fit(*data, batch_size=16, epochs=3, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    before, after = model.optimizer.bit_gradient, loaded.optimizer.bit_gradient
    assert after.interval == 3
    assert float(after.steps) == float(before.steps)
    for kind in ("statistics", "decisions"):
        rows = (getattr(each, kind).variables for each in (after, before))
        for new, old in zip(*rows, strict=True):
            np.testing.assert_array_equal(new, old)
    assert np.any(after.statistics.variables.loss_changes)


def test_the_predicted_losses_are_zero_here_fall_with_bits_and_end_at_the_bounds(make_model, data):
    model = compiled(make_model(bits=4, min_bits=2), data, Measured(interval=1))
    model.fit(*data, batch_size=16, epochs=3, verbose=0)
    kernels, losses = model.predicted_losses()
    assert losses.shape == (2, 16)
    assert np.isinf(losses[0, [0, *range(8, 16)]]).all()
    assert (np.diff(losses[0, 1:8]) < 0).all()
    np.testing.assert_allclose(losses[0, int(kernels[0].integer_bits()) - 1], 0, atol=1e-6)


@pytest.mark.thorough
def test_layers_not_yet_seen_are_taken_to_be_as_sensitive_as_others(make_model, data):
    model = compiled(make_model(bits=4), data, Measured(interval=50))
    model.fit(*data, batch_size=64, verbose=0)
    _, losses = model.predicted_losses()
    assert losses[1, 0] > 1e-3


def test_estimators_that_predict_no_losses_say_so(make_model, data):
    model = compiled(make_model(), data, "straight_through")
    with pytest.raises(ValueError, match="Received: bit_gradient=StraightThrough"):
        model.predicted_losses()


def test_an_interval_below_one_is_refused():
    with pytest.raises(ValueError, match="Received: interval=0"):
        Measured(interval=0)


def test_a_decision_holds_for_the_width_that_it_was_made_at(make_model, data):
    """With a step of a whole bit and ten steps between probes, a layer moves one bit at a time."""
    model = make_model(bits=8)
    model.compile(
        keras.optimizers.SGD(0.0), "mse", bit_reg=1e4, bit_optimizer=klb.SignSGD(1.0),
        bit_gradient=Measured(interval=10),
    )  # fmt: skip
    model.fit(*data, batch_size=8, epochs=2, verbose=0)  # 16 steps: two probes, one per layer
    assert [float(kernel.bits) for kernel in quantized_kernels(model)] == [6.0, 7.0]


def test_a_layer_moves_at_most_two_bits_between_probes(data):
    inputs = x = keras.Input((6,))
    for _ in range(4):
        x = klb.LearnedBitDense(6)(x)
    model = klb.LearnedBitModel(inputs, klb.LearnedBitDense(2)(x))
    model.compile(
        keras.optimizers.SGD(0.0), "mse", bit_reg=1e4, bit_optimizer=klb.SignSGD(1.0),
        bit_gradient=Measured(interval=1),
    )  # fmt: skip
    model.fit(*data, batch_size=13, verbose=0)  # five steps, one probe of each layer
    assert [float(k.bits) for k in quantized_kernels(model)] == [6.0, 6.0, 6.0, 6.0, 7.0]


def test_the_quantization_errors_pull_is_not_taken_for_the_tasks(make_model):
    zero = np.zeros((8, 6), "float32"), np.zeros((8, 2), "float32")
    model = compiled(make_model(bits=3), zero, "difference", quantization_reg=10.0)
    step = step_of(model, zero)
    measured, predicted = Measured().predict(step).numpy(), Difference().predict(step).numpy()
    assert measured[0, 0] > 0.1
    np.testing.assert_allclose(predicted[0], measured[0], rtol=1e-3)


def test_a_kernel_regularizers_pull_is_not_taken_for_the_tasks(make_model, data):
    plain, regularized = (
        compiled(make_model(bits=3, kernel_regularizer=each), data, "difference")
        for each in (None, keras.regularizers.L2(0.1))
    )
    regularized.set_weights(plain.get_weights())
    steps = [step_of(model, data) for model in (regularized, plain)]
    pulled, free = (step.kernel_gradients[step.tensors[0]] for step in steps)
    assert np.abs(pulled - free).max() > 0.05
    found, expected = (
        Difference().predict(step_of(model, data)).numpy() for model in (regularized, plain)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-3)


class Told(Difference):
    """An estimator that is given the cost of one bit fewer in each layer for each probe."""

    def __init__(self, costs):
        super().__init__(interval=1)
        self.costs = tf.constant(costs)

    def probe(self, step, errors):
        now = tf.gather(self.costs, tf.cast(self.steps.value, tf.int32))
        sensitivity = now / errors[:, :1]
        return sensitivity * errors, tf.not_equal(errors, 0.0)


def turns(model, data, costs, **settings):
    """Number of reversals of each layer, with a step of a tenth of a bit."""
    model = compiled(model, data, "difference", **settings)
    estimator = Told(costs)
    estimator.build(
        quantized_kernels(model), lambda shape, **kwargs: keras.Variable(tf.zeros(shape))
    )

    @tf.function
    def move():
        gradients = estimator(step_of(model, data))
        for index, kernel in enumerate(quantized_kernels(model)):
            kernel.bits.assign_sub(0.1 * gradients[index])
        return gradients

    moves = [move().numpy() for _ in costs]
    signs = [column[column != 0] for column in np.array(moves).T]
    return [int(np.sum(column[1:] != column[:-1])) for column in signs]


@pytest.mark.thorough
def test_noise_does_not_reverse_a_layer(make_model, data):
    noise = np.random.default_rng(0).normal(size=(120, 1, 1)) * np.ones((1, 2, 1))
    few = turns(make_model(bits=4, max_bits=16), data, noise.astype("float32"), bit_reg=1e-3)
    assert max(few) <= 3  # without a margin there are 20 and more


def test_a_layer_reverses_when_it_is_certain_to_gain(make_model, data):
    costs = np.repeat([0.0, 1.0], [20, 60])[:, None, None] * np.ones((1, 2, 1))
    once = turns(make_model(bits=4), data, costs.astype("float32"), bit_reg=0.1)
    assert once == [1, 1]


@pytest.mark.thorough
def test_an_estimator_given_to_two_models_has_a_state_in_each(make_model, data):
    shared = Measured(interval=1)
    models = [compiled(make_model(bits=4), data, shared, bit_reg=1e4) for _ in range(2)]
    for model in models:
        model.fit(*data, batch_size=16, verbose=0)
    assert [float(quantized_kernels(model)[0].bits) < 4 for model in models] == [True, True]


def test_a_model_whose_learned_bit_layers_are_all_frozen_trains(data):
    inputs = keras.Input((6,))
    hidden = klb.LearnedBitDense(8, trainable=False)(inputs)
    model = klb.LearnedBitModel(inputs, keras.layers.Dense(2)(hidden))
    model.compile("sgd", "mse")
    losses = model.fit(*data, epochs=4, callbacks=[klb.FreezeBits(at=0.5)], verbose=0).history
    assert losses["loss"][-1] < losses["loss"][0]
    assert klb.bit_table(model).mean_bits == 8
