import contextlib
import json
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from thorough import thorough

import keras_learnbits as klb
from keras_learnbits.layers.discovery import quantized_kernels
from keras_learnbits.training.model import LearnedBitTraining
from keras_learnbits.training.step import TrainingStep


class Subclassed(klb.LearnedBitModel):
    """A model with a custom `call`, which takes no `training`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden = klb.LearnedBitDense(8, activation="relu")
        self.head = klb.LearnedBitDense(2)

    def call(self, inputs):
        return self.head(self.hidden(inputs))


class FunctionalSubclass(klb.LearnedBitModel):
    """A functional model of a custom class."""

    def __init__(self):
        inputs = keras.Input((6,))
        super().__init__(inputs, klb.LearnedBitDense(2)(inputs))


def sequential():
    return klb.LearnedBitSequential(
        [klb.LearnedBitDense(8, activation="relu"), klb.LearnedBitDense(2)]
    )


def functional():
    inputs = keras.Input((6,))
    x = keras.layers.Dropout(0.1)(klb.LearnedBitDense(8, activation="relu")(inputs))
    return klb.LearnedBitModel(inputs=inputs, outputs=klb.LearnedBitDense(2)(x))


every_kind = pytest.mark.parametrize(
    "make",
    [functional, *thorough(Subclassed, FunctionalSubclass, sequential)],
    ids=lambda f: f.__name__,
)


def bits_of(model):
    return [float(tf.convert_to_tensor(k.bits.value)) for k in quantized_kernels(model)]


@every_kind
def test_every_kind_of_model_learns_weights_and_bits(make, data):
    model = make()
    model.compile(
        keras.optimizers.Adam(0.02),
        "mse",
        bit_reg=0.1,
        bit_optimizer=klb.SignSGD(0.125),
        bit_gradient="straight_through",
    )
    history = model.fit(*data, epochs=20, batch_size=64, verbose=0).history
    assert history["task_loss"][-1] < history["task_loss"][0] / 2
    assert all(bits < 8 for bits in bits_of(model))
    assert isinstance(model, LearnedBitTraining)


@pytest.mark.thorough
def test_functional_and_subclassed_models_live_side_by_side(data):
    for make in (functional, FunctionalSubclass, Subclassed, FunctionalSubclass, Subclassed):
        model = make()
        assert isinstance(model, klb.LearnedBitModel)
        model.compile("sgd", "mse")
        model.fit(*data, verbose=0)
    assert klb.LearnedBitModel.__bases__ == (LearnedBitTraining, keras.Model)


@pytest.mark.thorough
def test_a_subclassed_model_may_be_trained_with_dropout(data):
    class Dropping(Subclassed):
        def call(self, inputs, training=False):
            return super().call(inputs) * (0.0 if training else 1.0)

    model = Dropping()
    model.compile("sgd", "mse")
    history = model.fit(*data, batch_size=64, verbose=0).history
    np.testing.assert_allclose(history["task_loss"], np.mean(data[1] ** 2), rtol=1e-5)


def test_bits_move_by_exactly_the_step(make_model, data):
    model = make_model()
    model.compile(
        "sgd",
        "mse",
        bit_reg=100.0,
        bit_optimizer=klb.SignSGD(0.25),
        bit_gradient="straight_through",
    )
    model.fit(*data, batch_size=16, epochs=1, verbose=0)
    assert bits_of(model) == [7.0, 7.0]


def test_bits_never_leave_their_bounds(make_model, data):
    model = make_model(bits=3, min_bits=2, max_bits=4)
    model.compile(
        keras.optimizers.SGD(0.0),
        "mse",
        bit_reg=100.0,
        bit_optimizer=klb.SignSGD(0.75),
        bit_gradient="straight_through",
    )
    model.fit(*data, batch_size=4, verbose=0)
    assert bits_of(model) == [2.0, 1.0]
    model.compile(
        keras.optimizers.SGD(0.0),
        "mse",
        bit_reg=0.0,
        quantization_reg=1e6,
        bit_optimizer=klb.SignSGD(0.75),
        bit_gradient="straight_through",
    )
    model.fit(*data, batch_size=4, verbose=0)
    assert bits_of(model) == [4.0, 8.0]


@pytest.mark.parametrize(
    ("penalty", "error"),
    [
        ("bits", "relative"),
        *thorough(("levels", "squared"), ("bits", "squared"), ("levels", "relative")),
    ],
)
def test_the_parts_of_the_loss_sum_to_the_loss_in_fit_and_evaluate(
    penalty, error, make_model, data
):
    model = make_model(bits=2, kernel_regularizer="l2")
    model.compile(
        "sgd", "mse", bit_reg=0.3, quantization_reg=0.7, bit_penalty=penalty,
        quantization_error=error, metrics=["mae"],
    )  # fmt: skip
    # Batches of unequal size, which means over examples must take into account.
    logs = model.fit(*data, batch_size=24, validation_data=data, verbose=0).history
    logs = {name: values[0] for name, values in logs.items()}
    np.testing.assert_allclose(logs["bit_reg"], 0.3, rtol=1e-6)
    for part in (logs, model.evaluate(*data, verbose=0, return_dict=True)):
        price = 0.3 * part["mean_bits" if penalty == "bits" else "bit_penalty"]
        total = part["task_loss"] + 0.7 * part["quantization_error"] + price
        np.testing.assert_allclose(part["loss"], total, rtol=1e-5)
    np.testing.assert_allclose(logs["val_task_loss"], part["task_loss"], rtol=1e-6)


def test_the_task_loss_is_that_of_a_keras_model_with_the_quantized_weights(make_model, data):
    model = make_model(bits=2)
    model.compile("sgd", "mse")
    layers = keras.layers
    twin = keras.Sequential(
        [keras.Input((6,)), layers.Dense(8, activation="relu"), layers.Dense(2)]
    )
    for mine, its in zip((model.get_layer("hidden"), model.get_layer("head")), twin.layers,
                         strict=True):  # fmt: skip
        quantized = mine.quantized_kernels["kernel"].quantized()
        its.set_weights([quantized.numpy(), mine.bias.numpy()])
    twin.compile("sgd", "mse")
    logs = model.evaluate(*data, verbose=0, return_dict=True)
    np.testing.assert_allclose(logs["task_loss"], twin.evaluate(*data, verbose=0), rtol=1e-5)
    np.testing.assert_allclose(model.predict(data[0], verbose=0), twin.predict(data[0], verbose=0),
                               rtol=1e-4, atol=1e-5)  # fmt: skip


def test_evaluate_and_predict_use_the_integer_nearest_to_the_bits(make_model, data):
    model = make_model()
    predictions = {}
    for bits in (2.0, 2.4, 2.6, 3.0):
        model.get_layer("hidden").bits.assign(bits)
        predictions[bits] = model.predict(data[0], verbose=0)
    np.testing.assert_array_equal(predictions[2.0], predictions[2.4])
    np.testing.assert_array_equal(predictions[3.0], predictions[2.6])
    assert np.abs(predictions[2.0] - predictions[3.0]).max() > 1e-3


def test_callbacks_may_change_the_price_within_fit(make_model, data):
    model = make_model()
    model.compile("sgd", "mse", bit_reg=0.0, quantization_reg=0.0)
    change = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: model.bit_reg.assign(float(epoch))
    )
    history = model.fit(*data, epochs=3, callbacks=[change], verbose=0).history
    assert history["bit_reg"] == [0.0, 1.0, 2.0]
    difference = np.subtract(history["loss"], history["task_loss"])
    np.testing.assert_allclose(difference, np.arange(3) * history["mean_bits"], rtol=1e-4)


@pytest.mark.parametrize(
    "make", [functional, *thorough(Subclassed, sequential)], ids=lambda f: f.__name__
)
def test_a_saved_model_goes_on_as_the_original_does(make, data, tmp_path):
    settings = {
        "bit_reg": 0.05,
        "quantization_reg": 0.01,
        "bit_penalty": "levels",
        "quantization_error": "squared",
        "bit_optimizer": klb.SignSGD(0.0625),
    }
    model = make()
    model.compile(keras.optimizers.AdamW(0.01), "mse", metrics=["mae"], **settings)
    model.fit(*data, epochs=2, shuffle=False, verbose=0)
    model.bit_reg.assign(0.07)
    custom = {make.__name__: make} if isinstance(make, type) else {}
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", custom_objects=custom)
    assert type(loaded).__name__ == type(model).__name__
    assert json.dumps(loaded.get_compile_config()) == json.dumps(model.get_compile_config())
    for before, after in zip(model.variables, loaded.variables, strict=True):
        if "seed" not in before.path:
            np.testing.assert_array_equal(before, after)
    ends = []
    for trained in (model, loaded):
        keras.utils.set_random_seed(5)
        for layer in trained.layers:
            if isinstance(layer, keras.layers.Dropout):
                layer.rate = 0.0
        trained.train_function = None
        trained.fit(*data, epochs=2, shuffle=False, verbose=0)
        ends.append([v.numpy() for v in trained.trainable_variables])
    for before, after in zip(*ends, strict=True):
        np.testing.assert_array_equal(before, after)


def test_a_model_saved_without_compiling_loads(make_model, data, tmp_path):
    model = make_model(bits=3)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(
        model.predict(data[0], verbose=0), loaded.predict(data[0], verbose=0)
    )


def test_weights_move_between_a_learned_bit_model_and_a_plain_one(make_model, data, tmp_path):
    model = make_model(bits=3)
    model.compile("adam", "mse")
    model.freeze_bits()
    model.save_weights(tmp_path / "model.weights.h5")
    plain = keras.Model(*(lambda m: (m.inputs, m.outputs))(make_model(bits=5)))
    plain.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(
        plain.predict(data[0], verbose=0), model.predict(data[0], verbose=0)
    )


def test_compiling_again_sets_the_price_again_and_keeps_bits_frozen(make_model, data):
    model = make_model()
    model.compile("adam", "mse", bit_reg=5.0)
    model.freeze_bits()
    model.compile(
        "adam", "mse", bit_reg=1.0, bit_optimizer=klb.SignSGD(0.25), bit_gradient="straight_through"
    )
    assert float(model.bit_reg) == 1.0
    model.fit(*data, batch_size=64, verbose=0)
    assert bits_of(model) == [8, 8]
    model.unfreeze_bits()
    model.fit(*data, batch_size=64, verbose=0)
    assert bits_of(model) == [7.75, 7.75]


def test_a_loss_of_each_example_is_refused(make_model, data):
    model = make_model()
    model.compile("adam", keras.losses.MeanSquaredError(reduction=None))
    for method in (model.fit, model.evaluate):
        with pytest.raises(ValueError, match="one number per batch.*Received: a loss of shape"):
            method(*data, verbose=0)


@pytest.mark.thorough
def test_a_debugger_of_numbers_finds_nothing_in_a_healthy_training():
    script = """
import keras, numpy as np, tensorflow as tf, keras_learnbits as klb
tf.debugging.enable_check_numerics()
float_model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3), keras.layers.Dense(2)])
model = klb.to_learned_bits(float_model)
model.compile("adam", "mse", bit_gradient=klb.bit_gradients.Measured(interval=1))
x, y = np.ones((64, 6), "float32"), np.ones((64, 2), "float32")
callbacks = [klb.BitBudget(4.0), klb.FreezeBits(at=2)]
model.fit(x, y, epochs=3, batch_size=8, callbacks=callbacks, verbose=0)
print(klb.bit_table(model).mean_bits)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) <= 4


def test_before_compile_there_is_no_price(make_model):
    with pytest.raises(AttributeError, match="must compile the model"):
        make_model().bit_reg.assign(1.0)


def test_bits_cannot_be_frozen_before_compile(make_model):
    model = make_model()
    with pytest.raises(AttributeError, match="must compile the model"):
        model.freeze_bits([3, 2])
    assert [float(tensor.bits) for tensor in model.quantized_tensors] == [8, 8]


def test_a_model_frozen_before_its_first_step_is_so_in_its_file(make_model, data, tmp_path):
    model = make_model()
    model.compile("adam", "mse", bit_reg=9.0)
    model.freeze_bits([3, 2])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.bits_are_frozen
    loaded.fit(*data, verbose=0)
    assert bits_of(loaded) == [3, 2]


@pytest.mark.parametrize("run_eagerly", [True, *thorough(False)])
def test_trainable_may_be_toggled_without_compiling(run_eagerly, make_model, data):
    model = make_model()
    model.get_layer("hidden").trainable = False
    model.compile(
        "adam", "mse", bit_reg=1.0, run_eagerly=run_eagerly, bit_gradient="straight_through"
    )
    model.fit(*data, verbose=0)
    assert bits_of(model)[0] == 8.0
    model = make_model()
    model.compile(
        "adam", "mse", bit_reg=1.0, run_eagerly=run_eagerly, bit_gradient="straight_through"
    )
    model.fit(*data, batch_size=64, verbose=0)
    model.get_layer("hidden").trainable = False
    model.fit(*data, batch_size=64, verbose=0)
    model.get_layer("hidden").trainable = True
    model.fit(*data, batch_size=64, verbose=0)
    assert bits_of(model)[1] == pytest.approx(8 - 3 * 0.01, abs=1e-5)


@pytest.mark.parametrize("built", [False, *thorough(True)])
def test_a_model_with_a_custom_build_learns_bits(built, data):
    class Lazy(Subclassed):
        def build(self, input_shape):
            self.built = True

    model = Lazy()
    model.compile(
        "adam", "mse", bit_reg=1.0, bit_optimizer=klb.SignSGD(0.25), bit_gradient="straight_through"
    )
    if built:
        model.build((None, 6))
    model.fit(*data, batch_size=64, verbose=0)
    assert bits_of(model) == [7.75, 7.75]


@pytest.mark.thorough
@pytest.mark.parametrize("floatx", ["float64", "bfloat16"])
def test_other_float_types_learn(floatx, make_model, data):
    keras.config.set_floatx(floatx)
    keras.config.set_dtype_policy(floatx)
    try:
        model = make_model()
        model.compile(
            "adam",
            "mse",
            bit_reg=1.0,
            bit_optimizer=klb.SignSGD(0.25),
            bit_gradient="straight_through",
        )
        model.fit(*data, batch_size=64, verbose=0)
        assert bits_of(model) == [7.75, 7.75]
    finally:
        keras.config.set_floatx("float32")


def test_freezing_rounds_the_bits_and_weights_go_on(make_model, data):
    model = make_model()
    model.compile(
        "adam", "mse", bit_reg=10.0, bit_optimizer=klb.SignSGD(0.3), bit_gradient="straight_through"
    )
    model.fit(*data, batch_size=16, verbose=0)
    assert bits_of(model) == pytest.approx([6.8, 6.8])
    model.freeze_bits()
    before = quantized_kernels(model)[0].kernel.numpy()
    model.fit(*data, verbose=0)
    assert bits_of(model) == [7.0, 7.0]
    assert np.abs(quantized_kernels(model)[0].kernel.numpy() - before).max() > 0
    model.unfreeze_bits()
    model.fit(*data, batch_size=64, verbose=0)
    assert bits_of(model) == pytest.approx([6.7, 6.7])


def test_bits_are_trainable_variables_of_the_model_only(make_model):
    model = make_model()
    paths = [variable.path for variable in model.trainable_variables]
    assert "hidden/bits" in paths
    assert "head/bits" in paths
    assert not any(path.endswith("bits") for path in
                   (v.path for v in model.non_trainable_variables))  # fmt: skip
    assert len(model.trainable_weights) + len(model.non_trainable_weights) == len(model.weights)
    model.trainable = False
    assert model.trainable_variables == []


def test_the_extra_variables_are_few(make_model):
    model = make_model()
    keras_parameters = 6 * 8 + 8 + 8 * 2 + 2
    scales, bits = 8 + 2, 2
    assert model.count_params() == keras_parameters + scales + bits


@pytest.mark.thorough
def test_the_same_seed_gives_the_same_bits(make_model, data):
    ends = []
    for _ in range(2):
        keras.utils.set_random_seed(3)
        model = make_model()
        model.compile(
            "adam",
            "mse",
            bit_reg=0.05,
            bit_optimizer=klb.SignSGD(0.07),
            bit_gradient="straight_through",
        )
        model.fit(*data, batch_size=8, epochs=5, verbose=0)
        ends.append(bits_of(model))
    assert ends[0] == ends[1]


def test_a_step_that_overflows_in_mixed_float16_moves_no_bit(make_model, data):
    keras.config.set_dtype_policy("mixed_float16")
    model = make_model()
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(), initial_scale=2.0**60)
    model.compile(optimizer, "mse", bit_reg=1.0, bit_gradient="straight_through")
    model.fit(*data, batch_size=64, verbose=0)
    assert bits_of(model) == [8.0, 8.0]
    assert float(model.optimizer.dynamic_scale) == 2.0**59


def test_two_replicas_learn_the_bits_that_one_learns(strategy, make_model, data):
    def train():
        model = make_model(bits=3)
        logger = klb.BitLogger(update_freq=1)
        model.compile(
            "adam", "mse", bit_reg=2e-2, bit_optimizer=klb.SignSGD(0.0625),
            bit_gradient="straight_through",
        )  # fmt: skip
        logs = model.fit(
            *data, batch_size=8, epochs=2, shuffle=False, verbose=0, callbacks=[logger]
        ).history
        return logs, np.array(logger.bits), model.predict(data[0], verbose=0)

    one_logs, one_bits, one = train()
    keras.utils.set_random_seed(1)
    with strategy.scope():
        two_logs, two_bits, two = train()
    moves = np.diff(one_bits[:, 0])
    assert (moves > 0).any()  # the sign is not that of the price alone
    assert (moves < 0).any()
    np.testing.assert_array_equal(one_bits, two_bits)
    np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-4)
    for name in ("loss", "task_loss", "mean_bits", "quantization_error"):
        np.testing.assert_allclose(one_logs[name], two_logs[name], rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("value", [-1e-3, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["bit_reg", "quantization_reg"])
def test_prices_that_are_negative_or_not_finite_are_refused(name, value, make_model):
    with pytest.raises(ValueError, match=f"`{name}` must be a finite number >= 0. Received: "):
        make_model().compile("adam", "mse", **{name: value})


@pytest.mark.parametrize("name", ["bit_penalty", "quantization_error", "bit_gradient"])
def test_unknown_names_are_refused(name, make_model):
    with pytest.raises(ValueError, match=f"`{name}` must be one of .*Received: {name}='typo'"):
        make_model().compile("adam", "mse", **{name: "typo"})


def test_a_model_without_learned_bit_layers_is_refused(data):
    inputs = keras.Input((6,))
    model = klb.LearnedBitModel(inputs, keras.layers.Dense(2)(inputs))
    with pytest.raises(ValueError, match="needs at least one learned-bit kernel"):
        model.compile("adam", "mse")


def test_a_learned_bit_layer_in_a_spectral_normalization_is_refused():
    dense = klb.LearnedBitDense(2, name="rounded")
    layers = [keras.layers.SpectralNormalization(dense, name="spectral"), klb.LearnedBitDense(1)]
    for inputs in ([], [keras.Input((6,))]):
        model = klb.LearnedBitSequential(inputs + layers)
        with pytest.raises(ValueError, match="Received: 'spectral', which holds 'rounded'"):
            model.compile("adam", "mse")


@pytest.mark.parametrize("run_eagerly", [False, *thorough(True)])
def test_a_loss_that_is_no_number_stops_training_before_it_does_harm(run_eagerly, make_model, data):
    model = make_model()
    model.compile("adam", "mse", bit_reg=1.0, run_eagerly=run_eagerly)
    before = [v.numpy() for v in model.trainable_variables]
    x, y = data
    with pytest.raises(tf.errors.InvalidArgumentError, match="Look for NaN in the data"):
        model.fit(x, y * np.nan, verbose=0)
    for old, new in zip(before, model.trainable_variables, strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.thorough
def test_in_mixed_float16_steps_that_are_no_numbers_are_skipped(make_model, data):
    keras.config.set_dtype_policy("mixed_float16")
    model = make_model()
    model.compile("adam", "mse", bit_reg=1.0)
    before = [v.numpy() for v in model.trainable_variables]
    x, y = data
    model.fit(x, y * np.nan, verbose=0)
    for old, new in zip(before, model.trainable_variables, strict=True):
        np.testing.assert_array_equal(old, new)


def test_sample_weights_weigh_the_task_only(make_model, data):
    model = make_model()
    model.compile("sgd", "mse", bit_reg=1.0, quantization_reg=0.0)
    logs = model.evaluate(*data, sample_weight=np.zeros(64), verbose=0, return_dict=True)
    assert logs["task_loss"] == 0.0
    assert logs["loss"] == 8.0


def test_recompiling_with_the_models_own_optimizer_keeps_both_optimizers(make_model, data):
    model = make_model()
    model.compile(keras.optimizers.Adam(0.03), "mse", bit_optimizer=klb.SignSGD(0.125))
    model.compile(model.optimizer, "mse", bit_reg=1.0, bit_gradient="straight_through")
    model.fit(*data, batch_size=64, verbose=0)
    assert bits_of(model) == [7.875, 7.875]
    assert float(model.optimizer.learning_rate) == np.float32(0.03)


@pytest.mark.parametrize("bits", [[2.5, 3], [20, 3], [0, 3], [3]], ids=str)
def test_bits_to_freeze_at_are_checked_before_any_is_set(bits, make_model):
    model = make_model()
    model.compile("adam", "mse")
    with pytest.raises(ValueError, match="`bits` must be an integer within its layer's bounds"):
        model.freeze_bits(bits)
    assert bits_of(model) == [8.0, 8.0]


@pytest.mark.parametrize("metrics", [["mae", keras.metrics.MeanSquaredError()], *thorough(None)])
@pytest.mark.parametrize("distributed", [False, *thorough(True)])
def test_fit_traces_a_training_step_once(
    distributed, metrics, make_model, data, strategy, monkeypatch
):
    traces = []
    original = TrainingStep.train_step

    def train_step(model, batch):
        traces.append(model)
        return original(model, batch)

    monkeypatch.setattr(TrainingStep, "train_step", train_step)
    with strategy.scope() if distributed else contextlib.nullcontext():
        model = make_model()
        model.compile("adam", "mse", metrics=metrics)
    model.fit(*data, batch_size=16, epochs=2, verbose=0)
    assert len(traces) == (2 if distributed else 1)  # one per replica


@pytest.mark.thorough
def test_a_train_step_that_makes_new_labels_keeps_its_metrics(data):
    class OneHot(klb.LearnedBitSequential):
        def train_step(self, batch):
            x, y = batch
            return super().train_step((x, tf.one_hot(y, 4)))

    model = OneHot([keras.Input((6,)), klb.LearnedBitDense(4, activation="softmax")])
    model.compile(keras.optimizers.Adam(0.05), "categorical_crossentropy", metrics=["accuracy"])
    labels = np.argmax(data[0][:, :4], axis=-1)
    history = model.fit(data[0], labels, epochs=60, verbose=0).history
    assert history["accuracy"][-1] > 0.5


class Counting(klb.LearnedScaleQuantizer):
    """A quantizer that counts how often it rounds."""

    count = 0

    def quantize_with_error(self, *args, **kwargs):
        type(self).count += 1
        return super().quantize_with_error(*args, **kwargs)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_a_step_rounds_each_kernel_once_also_where_its_layer_is_shared(policy, data):
    keras.config.set_dtype_policy(policy)
    x, y = (tf.constant(each) for each in data)
    inputs = keras.Input((6,))
    shared = klb.LearnedBitDense(6, kernel_quantizer=Counting())
    outputs = klb.LearnedBitDense(2, kernel_quantizer=Counting())(shared(shared(inputs)))
    model = klb.LearnedBitModel(inputs, outputs)
    model.compile("sgd", "mse", bit_gradient="straight_through", run_eagerly=True)
    for step in (model.train_step, model.test_step):
        Counting.count = 0
        step((x, y))
        assert Counting.count == 2


@pytest.mark.thorough
@pytest.mark.parametrize("bit_gradient", ["measured", "difference"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_kernel_that_begins_at_zeros_trains(bit_gradient, optimizer, data):
    layers = [klb.LearnedBitDense(8), klb.LearnedBitDense(2, kernel_initializer="zeros")]
    model = klb.LearnedBitSequential([keras.Input((6,)), *layers])
    model.compile(optimizer, "mse", bit_gradient=bit_gradient)
    losses = model.fit(*data, batch_size=8, epochs=20, verbose=0).history["task_loss"]
    assert losses[-1] < losses[0] / 2
