import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from thorough import thorough

import keras_learnbits as klb
from keras_learnbits.layers import activation
from keras_learnbits.layers.discovery import quantized_tensors

L = keras.layers


@pytest.fixture
def values():
    return np.random.default_rng(0).normal(size=(400, 10)).astype("float32")


@pytest.fixture
def make_net():
    """A function that makes a compiled model with an activation of 12 values, named "act"."""

    def make(compile_arguments=None, **arguments):
        inputs = keras.Input((6,))
        x = klb.LearnedBitDense(12, activation="relu", name="hidden")(inputs)
        x = klb.LearnedBitActivation(name="act", **arguments)(x)
        model = klb.LearnedBitModel(inputs, klb.LearnedBitDense(2, name="head")(x))
        settings = {
            "bit_reg": 0.01,
            "bit_gradient": klb.bit_gradients.Measured(interval=10),
            "bit_optimizer": klb.SignSGD(0.1),
            "loss": "mse",
        }
        model.compile("adam", **{**settings, **(compile_arguments or {})})
        return model

    return make


def calibrated(values, **arguments):
    layer = klb.LearnedBitActivation(**arguments)
    layer(values, training=True)
    return layer


def error(values, low, step, bits):
    codes = np.clip(np.round((values - low) / step), 0, 2**bits - 1)
    return np.square(low + codes * step - values).sum()


@pytest.mark.parametrize("bits", [2, 3, 5])
@pytest.mark.parametrize("signed", [False, True])
def test_values_go_to_the_nearest_of_two_to_the_bits_levels_with_one_at_zero(values, signed, bits):
    values = values if signed else np.abs(values)
    layer = calibrated(values, bits=bits)
    step = float(layer.grid().step)
    first = -(2 ** (bits - 1)) if signed else 0
    levels = step * np.arange(first, first + 2**bits)
    nearest = levels[np.abs(values[..., None] - levels).argmin(-1)]
    np.testing.assert_allclose(layer(values), nearest, atol=1e-6)
    assert 0.0 in np.unique(layer(values))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_range_is_fitted_with_the_least_squared_error(values, signed, bits):
    values = values if signed else np.maximum(values, 0)
    step = float(calibrated(values, bits=bits).grid().step)
    first = -(2 ** (bits - 1)) if signed else 0
    found = error(values, first * step, step, bits)
    best = min(error(values, first * s, s, bits) for s in step * np.geomspace(0.25, 4, 400))
    assert found < 1.1 * best


def test_before_the_first_training_batch_values_pass_as_they_are(values):
    layer = klb.LearnedBitActivation(bits=2)
    np.testing.assert_array_equal(layer(values), values)
    np.testing.assert_array_equal(layer(values, training=False), values)
    with pytest.raises(ValueError, match="only after it was called on a training"):
        layer.grid()


def test_the_range_is_the_mean_of_the_first_batches_and_then_stays(values):
    layer = klb.LearnedBitActivation(calibration_batches=np.int64(2))
    scales = []
    for factor in (1.0, 4.0, 100.0):
        layer(factor * values, training=True)
        scales.append(float(layer.log_scale()))
    assert scales[1] - scales[0] == pytest.approx(np.log(4) / 2, rel=0.02)  # of other samples
    assert scales[2] == scales[1]


def test_batches_that_say_nothing_fit_nothing(values):
    layer = klb.LearnedBitActivation()
    for nothing in (np.nan * values, np.inf * values, 0 * values, values[:0]):
        layer(nothing, training=True)
        assert float(layer.batches_seen) == 0
    layer(values, training=True)
    assert np.isfinite(layer(values)).all()


def test_the_range_is_fitted_to_all_channels():
    values = np.random.default_rng(0).uniform(0, 10, (32, 32, 32, 64)).astype("float32")
    values[..., 0] = 0
    assert float(tf.reduce_max(calibrated(values, bits=4)(values))) > 9


def test_replicas_that_disagree_about_the_sign_have_a_signed_grid(values):
    layer = calibrated(values, bits=3)
    expected = layer(values)
    layer.signed.assign(0.25)
    np.testing.assert_array_equal(layer(values), expected)


def test_the_gradient_of_the_scale_is_the_same_where_dimensions_are_not_fixed(values):
    gradients = []
    for shape in ((None, 10), (None, None)):
        layer = klb.LearnedBitActivation(bits=3)
        layer.build(shape)
        layer(values, training=True)
        with tf.GradientTape() as tape:
            total = tf.reduce_sum(layer(values))
        gradients.append(float(tape.gradient(total, layer.trained_log_scale.value)))
    assert gradients[0] == gradients[1] != 0


def test_gradients_are_those_of_lsq(values):
    """Straight through within the range, 0 beyond it; that of the scale is divided by a root."""
    layer = calibrated(values, bits=3)
    with tf.GradientTape() as tape:
        inputs = tf.constant(values)
        tape.watch(inputs)
        outputs = layer(inputs)
        total = tf.reduce_sum(outputs)
    to_inputs, to_scale = tape.gradient(total, [inputs, layer.trained_log_scale.value])
    step = float(layer.grid().step)
    inside = (values / step > -4.5) & (values / step < 3.5)
    np.testing.assert_array_equal(to_inputs, inside.astype("float32"))
    by_step = np.where(inside, outputs.numpy() - values, outputs.numpy()) / step
    assert float(to_scale) == pytest.approx(step * by_step.sum() / np.sqrt(10), rel=1e-3)


@pytest.mark.parametrize(
    "arguments",
    [{"bits": 1}, {"min_bits": 1}, {"bits": 9}, {"max_bits": 17}, {"calibration_batches": 0}],
)
def test_bad_settings_are_refused(arguments):
    with pytest.raises(ValueError, match="Received"):
        klb.LearnedBitActivation(**arguments)


@pytest.mark.parametrize("bit_gradient", ["measured", *thorough("straight_through")])
def test_bits_of_activations_fall_at_a_high_price_and_stay_at_no_price(
    make_net, data, bit_gradient
):
    ends = []
    for price in (0.0, 100.0):
        model = make_net({"bit_reg": price, "bit_gradient": bit_gradient}, bits=6)
        history = model.fit(*data, batch_size=8, epochs=24, verbose=0).history
        ends.append(float(model.get_layer("act").bits))
    assert ends[0] > 4
    assert round(ends[1]) == 2
    assert history["mean_activation_bits"][-1] < history["mean_activation_bits"][0]


def test_estimators_that_know_kernels_only_are_refused(make_net, data):
    for name in ("difference", "paper"):
        model = make_net({"bit_gradient": name})
        with pytest.raises(ValueError, match="learned with bit_gradient='measured'"):
            model.fit(*data, verbose=0)


def test_the_price_is_mean_bits_per_weight_plus_mean_bits_per_value(make_net):
    model = make_net(bits=3)
    other = klb.LearnedBitActivation(bits=5)
    other.build((None, 4))
    tensors = quantized_tensors(model) + quantized_tensors(other)
    expected = 8 + (12 * 3 + 4 * 5) / 16
    assert float(model.bit_objective.penalty(tensors)) == pytest.approx(expected)


@pytest.mark.thorough
def test_the_measured_change_of_an_activation_is_that_of_the_evaluated_loss(make_net, data):
    model = make_net({"quantization_reg": 0.0}, bits=4)
    model.fit(*data, verbose=0)
    act = model.get_layer("act")
    act.bits.assign(4.0)
    probe = klb.probe_bits(model, *data, layers=["act"], training=False)
    assert set(probe.changes[0].predicted) == {"straight_through", "measured"}
    before = model.evaluate(*data, verbose=0, return_dict=True)["task_loss"]
    for change in probe.changes:
        act.bits.assign(4.0 + change.step)
        after = model.evaluate(*data, verbose=0, return_dict=True)["task_loss"]
        assert change.measured == pytest.approx(after - before, abs=1e-5)


def test_activations_are_logged_tabulated_and_frozen_at_integers(make_net, data):
    model = make_net()
    callbacks = [klb.BitLogger(), klb.FreezeBits(at=0.5)]
    history = model.fit(*data, batch_size=8, epochs=4, verbose=0, callbacks=callbacks).history
    table = klb.bit_table(model)
    (row,) = table.activations
    assert (row.layer, row.values, row.bits) == ("act", 12, history["bits/act"][-1])
    assert row.bounds[0] == 0
    assert row.bounds[1] == pytest.approx(
        float(np.max(model.get_layer("act")(1e6 * np.ones((1, 12)))))
    )
    assert table.mean_activation_bits == row.bits
    line = next(line for line in str(table).splitlines() if line.startswith("act "))
    assert line.split()[:3] == ["act", "12", str(row.bits)]
    assert "quantization_error/act" not in history
    model.freeze_bits([3, 2, 5])
    assert [
        row.bits for row in (*klb.bit_table(model).rows, *klb.bit_table(model).activations)
    ] == [
        3,
        2,
        5,
    ]


@pytest.mark.thorough
def test_a_budget_is_kept_by_the_weights_while_activations_follow_the_price(make_net, data):
    model = make_net({"bit_reg": 0.0})
    callbacks = [klb.BitBudget(target_bits=4.0), klb.FreezeBits(at=0.75)]
    model.fit(*data, batch_size=8, epochs=12, verbose=0, callbacks=callbacks)
    table = klb.bit_table(model)
    assert 3.5 <= table.mean_bits <= 4.0
    assert table.activations[0].bits in range(2, 9)


def test_the_bits_of_a_frozen_layer_stay(make_net, data):
    model = make_net({"bit_reg": 100.0})
    model.get_layer("act").trainable = False
    model.compile("adam", "mse", bit_reg=100.0, bit_optimizer=klb.SignSGD(0.1))
    model.fit(*data, batch_size=8, epochs=4, verbose=0)
    assert float(model.get_layer("act").bits) == 8
    assert float(model.get_layer("hidden").bits) < 8


def test_a_saved_model_predicts_the_same(make_net, data, tmp_path):
    model = make_net()
    model.fit(*data, batch_size=8, epochs=3, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(
        again.predict(data[0], verbose=0), model.predict(data[0], verbose=0)
    )
    assert klb.bit_table(again).activations == klb.bit_table(model).activations


@pytest.mark.thorough
@pytest.mark.parametrize(
    "execution", [{"jit_compile": True}, {"run_eagerly": True}, {"steps_per_execution": 2}]
)
def test_bits_of_activations_are_the_same_in_every_way_of_execution(make_net, data, execution):
    ends = []
    for arguments in ({}, execution):
        keras.utils.set_random_seed(1)
        model = make_net({"bit_reg": 1.0, **arguments})
        model.fit(*data, batch_size=8, epochs=3, shuffle=False, verbose=0)
        act = model.get_layer("act")
        ends.append((float(act.bits), float(act.log_scale())))
    assert ends[0][0] < 8
    assert ends[1] == pytest.approx(ends[0], abs=1e-3)


@pytest.mark.thorough
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_rounds_in_float32_and_gives_the_compute_dtype(make_net, data, policy):
    keras.config.set_dtype_policy(policy)
    model = make_net({"bit_reg": 100.0})
    model.fit(*data, batch_size=8, epochs=4, verbose=0)
    act = model.get_layer("act")
    assert float(act.bits) < 8
    assert act(np.ones((1, 12))).dtype == policy.removeprefix("mixed_")
    assert len(np.unique(act(np.linspace(0, 9, 1200).reshape(100, 12)))) <= 2 ** round(
        float(act.bits)
    )


@pytest.mark.thorough
def test_two_replicas_fit_the_ranges_and_learn_the_bits_of_one(make_net, data, strategy):
    def train(model):
        batches = tf.data.Dataset.from_tensor_slices(data).batch(16)
        model.fit(batches, epochs=3, verbose=0)
        act = model.get_layer("act")
        variables = (act.bits, act.batches_seen, act.signed)
        return [float(tf.convert_to_tensor(variable.value)) for variable in variables]

    settings = {"bit_reg": 1.0, "bit_gradient": "straight_through"}
    one = train(make_net(settings))
    keras.utils.set_random_seed(1)
    with strategy.scope():
        model = make_net(settings)
    assert train(model) == pytest.approx(one)
    assert one[0] < 8
    for local in strategy.experimental_local_results(model.get_layer("act").bits.value):
        assert float(local) == pytest.approx(one[0])


def net_to_convert():
    image = keras.Input((8, 8, 3), name="image")
    h = L.Conv2D(4, 3, padding="same", activation="relu", name="stem")(image)
    h = L.Conv2D(4, 1, name="left")(h) + L.Conv2D(4, 3, padding="same", name="right")(h)
    h = keras.Sequential([keras.Input((8, 8, 4)), L.Conv2D(4, 1, name="inner")], name="block")(h)
    return keras.Model(image, L.Dense(2, name="head")(L.GlobalAveragePooling2D()(h)))


def test_conversion_quantizes_the_inputs_of_converted_layers_once_the_models_among_them():
    model = net_to_convert()
    learned = klb.to_learned_bits(model, activations={"bits": 4, "max_bits": 6})
    names = [row.layer for row in klb.bit_table(learned).activations]
    assert sorted(names) == ["head_input", "inner_input", "left_input", "stem_input"]
    left = learned.get_layer("left_input")
    assert (float(left.bits), left.max_bits) == (4, 6)
    report = {row[0]: row[3] for row in learned.conversion.rows}
    assert report["left_input"] == "inserted LearnedBitActivation"
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype("float32")
    uncalibrated = klb.to_learned_bits(model, bits=16, activations=True)
    np.testing.assert_allclose(uncalibrated(x), model(x), rtol=1e-3, atol=1e-3)


def test_converted_activations_go_back_to_plain_operations_that_predict_the_same(tmp_path):
    learned = klb.to_learned_bits(net_to_convert(), bits=4, activations={"bits": 3})
    x = np.random.default_rng(0).normal(size=(16, 8, 8, 3)).astype("float32")
    with pytest.raises(ValueError, match="only after it was called on a training"):
        klb.to_keras(learned)
    learned.compile("adam", "mse", bit_reg=0.1, bit_optimizer=klb.SignSGD(0.1))
    learned.fit(x, np.ones((16, 2)), epochs=3, batch_size=4, verbose=0)
    plain = klb.to_keras(learned)
    plain.save(tmp_path / "plain.keras")
    plain = keras.models.load_model(tmp_path / "plain.keras")
    assert not any("keras_learnbits" in type(op).__module__ for op in plain._flatten_layers())
    np.testing.assert_allclose(
        plain.predict(x, verbose=0), learned.predict(x, verbose=0), atol=1e-6
    )


@pytest.mark.thorough
def test_in_float32_a_model_of_mixed_precision_goes_back_as_its_float32_twin():
    x = np.random.default_rng(0).normal(size=(16, 8, 8, 3)).astype("float32")
    ends, weights = [], None
    for policy in ("mixed_bfloat16", "float32"):
        keras.config.set_dtype_policy(policy)
        keras.utils.set_random_seed(0)
        model = klb.to_learned_bits(net_to_convert(), bits=4, activations={"bits": 3})
        if ends:
            model.set_weights(weights)
        else:
            model(x, training=True)
            weights = model.get_weights()
        ends.append(klb.to_keras(model, float32=True)(x))
    assert ends[0].dtype == "float32"
    np.testing.assert_allclose(ends[0], ends[1], atol=1e-6)


def siamese():
    first, second = keras.Input((6,)), keras.Input((6,))
    tower = L.Dense(4, name="tower")
    return [first, second], tower(L.ReLU()(first)) + tower(L.ReLU()(second))


def attention():
    first, second = keras.Input((3, 6)), keras.Input((4, 6))
    return [first, second], L.MultiHeadAttention(2, 3)(L.ReLU()(first), L.ReLU()(second))


def taken_name():
    inputs = keras.Input((6,), name="head_input")
    return [inputs], L.Dense(2, name="head")(L.ReLU()(inputs))


@pytest.mark.parametrize(("make", "number"), [(siamese, 2), (attention, 2), (taken_name, 1)])
def test_each_inserted_activation_has_a_unique_name(make, number):
    learned = klb.to_learned_bits(keras.Model(*make()), activations=True)
    assert len({row.layer for row in klb.bit_table(learned).activations}) == number


def test_an_activation_that_was_called_by_keyword_goes_back(data):
    inputs = keras.Input((6,))
    x = klb.LearnedBitActivation()(inputs=inputs)
    model = klb.LearnedBitModel(inputs, klb.LearnedBitDense(2)(x))
    model(data[0], training=True)
    np.testing.assert_allclose(klb.to_keras(model)(data[0]), model(data[0]), atol=1e-6)


@pytest.mark.parametrize("activations", ["yes", {"name": "a"}, {"dtype": "float32"}, 3])
def test_other_settings_of_activations_are_refused(activations):
    with pytest.raises(ValueError, match="must be True, False, or a dictionary"):
        klb.to_learned_bits(net_to_convert(), activations=activations)


def test_a_model_whose_call_takes_no_training_is_refused(data):
    class Own(klb.LearnedBitModel):
        def __init__(self):
            super().__init__()
            self.act, self.dense = klb.LearnedBitActivation(), klb.LearnedBitDense(2)

        def call(self, x):
            return self.dense(self.act(x))

    model = Own()
    model.compile("adam", "mse")
    with pytest.raises(ValueError, match="needs a `call` that takes `training`"):
        model.fit(*data, verbose=0)


def test_bits_stay_until_a_range_was_fitted(make_net, data):
    model = make_net({"bit_reg": 100.0, "bit_gradient": "straight_through"})
    x, y = data
    model.fit(0 * x, y, batch_size=8, verbose=0)  # all inputs are zeros
    assert float(model.get_layer("act").bits) == 8
    model.fit(x, y, batch_size=8, verbose=0)
    assert float(model.get_layer("act").bits) < 8


@pytest.mark.thorough
def test_a_permitted_accuracy_drop_holds_with_the_activations_frozen(data):
    x, y = np.repeat(data[0], 8, axis=0), np.repeat(data[1], 8, axis=0).argmax(axis=1)
    inputs = keras.Input((6,))
    h = klb.LearnedBitDense(16, activation="relu")(inputs)
    h = klb.LearnedBitActivation(name="act", bits=3)(h)
    model = klb.LearnedBitModel(inputs, klb.LearnedBitDense(2)(h))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"], bit_reg=1.0)
    model.fit(x, y, epochs=5, verbose=0)
    model.get_layer("act").bits.assign(2.5)
    least = model.evaluate(x, y, verbose=0, return_dict=True)["accuracy"] - 0.05
    budget = klb.BitBudget(max_accuracy_drop=0.0, float_accuracy=least, validation_data=(x, y))
    budget.set_model(model)
    model.freeze_bits(budget.allocate())
    assert model.evaluate(x, y, verbose=0, return_dict=True)["accuracy"] >= least


def test_a_budget_without_a_kernel_to_spend_it_on_is_refused(make_net, data):
    model = make_net()
    for name in ("hidden", "head"):
        model.get_layer(name).trainable = False
    model.compile("adam", "mse")
    with pytest.raises(ValueError, match="needs a model with a trainable kernel"):
        model.fit(*data, verbose=0, callbacks=[klb.BitBudget(target_bits=4.0)])


def test_a_scale_is_all_that_an_activation_adds_to_the_bytes(make_net):
    model = make_net()
    table = klb.bit_table(model)
    biases = 4 * (12 + 2)
    assert table.packed_bytes == 6 * 12 + 12 * 2 + 4 * (12 + 2) + biases + 4
    assert table.float_bytes == 4 * (6 * 12 + 12 * 2) + biases


def test_a_sequential_model_with_activations_becomes_functional_and_goes_back(data):
    model = keras.Sequential([keras.Input((6,)), L.Dense(8, "relu"), L.Dropout(0.1), L.Dense(2)])
    learned = klb.to_learned_bits(model, activations=True)
    assert isinstance(learned, klb.LearnedBitModel)
    learned.compile("adam", "mse")
    learned.fit(*data, verbose=0)
    plain = klb.to_keras(learned)
    np.testing.assert_allclose(plain(data[0]), learned(data[0]), atol=1e-6)


@pytest.mark.thorough
def test_a_stack_of_learned_bit_layers_with_activations_goes_back(data):
    model = klb.LearnedBitSequential(
        [keras.Input((6,)), klb.LearnedBitActivation(), klb.LearnedBitDense(2)]
    )
    model.compile("adam", "mse")
    model.fit(*data, verbose=0)
    np.testing.assert_allclose(klb.to_keras(model)(data[0]), model(data[0]), atol=1e-6)


def test_what_is_quantized_already_is_not_quantized_twice():
    inputs = keras.Input((6,))
    x = klb.LearnedBitActivation(name="act")(L.Dense(4)(inputs))
    learned = klb.to_learned_bits(keras.Model(inputs, L.Dense(2)(x)), activations=True)
    assert [row.layer for row in klb.bit_table(learned).activations] == [
        "dense_input",
        "act",
    ]


def test_the_operands_of_a_sum_are_quantized_once():
    inputs = keras.Input((6,))
    x = L.Dense(6, name="first")(inputs)
    outputs = L.Dense(2, name="head")(L.Add(name="sum")([x, L.Dense(6, name="second")(x)]))
    learned = klb.to_learned_bits(keras.Model(inputs, outputs), activations=True)
    names = [row.layer for row in klb.bit_table(learned).activations]
    assert sorted(names) == ["first_input", "head_input", "second_input", "sum_input"]
    second = learned.get_layer("second_input").output
    assert any(each is second for each in learned.get_layer("sum").input)


def test_an_image_of_256_levels_is_exact_at_8_bits():
    layer = klb.LearnedBitActivation(bits=8)
    image = (np.random.default_rng(0).integers(0, 256, (16, 32, 32)) / 255).astype("float32")
    image[:, 0, 0] = 1.0
    layer(image, training=True)
    np.testing.assert_allclose(layer(image), image, rtol=0, atol=1e-6)


def test_activations_of_a_model_with_a_custom_call_are_refused():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = L.Dense(2)

        def call(self, x):
            return self.dense(x)

    model = Own()
    model(np.ones((1, 3)))
    with pytest.raises(ValueError, match="in a custom `call` use `LearnedBitActivation`"):
        klb.to_learned_bits(model, activations=True)


@pytest.mark.thorough
def test_all_activations_share_what_is_traced(data):
    """One trace serves all layers of a model, and the next model of other shapes."""
    shared = (activation._calibrated, activation._quantized_forward, activation._quantized_backward)
    counts = []
    for units in (3, 5, 7):
        layers = [keras.layers.Dense(units, activation="relu") for _ in range(3)]
        plain = keras.Sequential([keras.Input((6,)), *layers, keras.layers.Dense(2)])
        model = klb.to_learned_bits(plain, activations=True)
        model.compile("adam", "mse")
        model.fit(*data, verbose=0)
        counts.append([each.experimental_get_tracing_count() for each in shared])
    assert counts[0] == counts[1] == counts[2]


def test_a_loaded_model_may_have_layers_with_the_names_of_operations(tmp_path):
    """Keras counts the names that it makes up, not those of a file; a graph has each name once."""
    inputs = keras.Input((4,))
    a, b = L.Dense(4, name="a")(inputs), L.Dense(4, name="b")(inputs)
    x = L.Multiply(name="multiply")([L.Add(name="add_1")([a, b]), L.Add(name="add")([a, b])])
    model = klb.to_learned_bits(keras.Model(inputs, L.Dense(2)(x)), bits=4, activations=True)
    values = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
    model(values, training=True)
    model.save(tmp_path / "model.keras")
    keras.backend.clear_session()  # as in a new process
    loaded = keras.models.load_model(tmp_path / "model.keras")
    plain = klb.to_keras(loaded)
    np.testing.assert_array_equal(plain(values), model(values))
    layers = {layer.name for layer in loaded.layers}
    made = {each.name for each in plain.operations} - layers
    assert {re.sub(r"_\d+$", "", name) for name in made} == set(activation.OPERATIONS)
