"""`fit` and `evaluate`: the model after an error, logs, and returned values."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from thorough import thorough

import keras_learnbits as klb


@pytest.fixture
def model(make_model):
    model = make_model()
    settings = {"metrics": ["mae"], "bit_reg": 1e-3, "quantization_reg": 0.5}
    model.compile("adam", "mse", bit_optimizer=klb.SignSGD(0.2), **settings)
    return model


class Stop(keras.callbacks.Callback):
    def __init__(self, error, epoch=3):
        super().__init__()
        self.error, self.epoch = error, epoch

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self.epoch:
            raise self.error


def state(model):
    names = ("bit_reg", "quantization_reg", "bits_frozen")
    return {name: float(getattr(model, name).value) for name in names}


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), *thorough(RuntimeError("disk full"))], ids=repr
)
@pytest.mark.parametrize(
    "at", [0.25, *thorough(0.95)], ids=["after the freeze", "before the freeze"]
)
@pytest.mark.parametrize("frozen", [False, *thorough(True)])
def test_after_a_fit_that_raises_prices_and_freeze_are_as_before(model, data, error, at, frozen):
    if frozen:
        model.freeze_bits()
    before = state(model)
    callbacks = [klb.BitBudget(2.0), klb.FreezeBits(at=at, quantization_reg=2.0), Stop(error)]
    with pytest.raises(type(error)):
        model.fit(*data, epochs=8, verbose=0, callbacks=callbacks)
    assert state(model) == before
    assert model.fit_plan is None
    model.fit(*data, verbose=0)
    assert state(model) == before


@pytest.mark.thorough
def test_a_file_saved_within_a_fit_holds_the_prices_of_before(model, data, tmp_path):
    seen = []

    class Price(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(state(self.model)["bit_reg"])

    callbacks = [
        klb.BitBudget(1.5, update_freq=1),
        klb.FreezeBits(quantization_reg=2.0),
        keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras"),
        keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.weights.h5", save_weights_only=True),
        Price(),
    ]
    model.fit(*data, batch_size=8, epochs=8, verbose=0, callbacks=callbacks)
    assert max(seen) > 2e-3  # the budget set the price, and saving did not change it
    for epoch in range(1, 9):
        loaded = keras.models.load_model(tmp_path / f"{epoch}.keras")
        assert state(loaded)["bit_reg"] == pytest.approx(1e-3)
        assert state(loaded)["quantization_reg"] == pytest.approx(0.5)
        loaded.load_weights(tmp_path / f"{epoch}.weights.h5")
        assert state(loaded)["bit_reg"] == pytest.approx(1e-3)


def test_a_price_that_a_user_sets_stays(model, data):
    model.bit_reg.assign(0.25)
    model.fit(*data, epochs=4, verbose=0, callbacks=[klb.BitBudget(4.0), klb.FreezeBits()])
    assert state(model)["bit_reg"] == 0.25


def test_two_budgets_in_one_fit_are_refused(model, data):
    with pytest.raises(ValueError, match="takes one `BitBudget`"):
        model.fit(*data, verbose=0, callbacks=[klb.BitBudget(2.0), klb.BitBudget(3.0)])
    model.fit(*data, epochs=4, verbose=0, callbacks=[klb.BitBudget(4.0), klb.FreezeBits()])


@pytest.mark.parametrize("metric", ["mae", *thorough("loss", "task_loss")])
def test_metrics_of_which_less_is_better_are_refused(model, data, metric):
    budget = klb.BitBudget(
        max_accuracy_drop=0.1, float_accuracy=0.5, metric=metric, validation_data=data
    )
    with pytest.raises(ValueError, match=f"for which higher values are better.*metric='{metric}'"):
        model.fit(*data, verbose=0, callbacks=[budget])


def test_a_metric_with_a_custom_name_is_recognized_by_its_class(make_model, data):
    model = make_model()
    model.compile("adam", "mse", metrics=[keras.metrics.MeanSquaredError(name="quality")])
    budget = klb.BitBudget(
        max_accuracy_drop=0.1, float_accuracy=0.5, metric="quality", validation_data=data
    )
    with pytest.raises(ValueError, match="for which higher values are better"):
        model.fit(*data, verbose=0, callbacks=[budget])


@pytest.mark.parametrize(
    "callbacks",
    [
        lambda: [klb.BitBudget(1.5)],
        *thorough(
            lambda: [klb.BitBudget(1.5), klb.FreezeBits()],
            lambda: [
                keras.callbacks.EarlyStopping(
                    "loss", patience=0, min_delta=1e9, start_from_epoch=1
                ),
                klb.FreezeBits(at=30),
                klb.BitBudget(1.5),
            ],
        ),
    ],
    ids=["one epoch, budget", "one epoch, freeze", "early stopping"],
)
def test_bits_that_fall_with_no_training_left_are_said_aloud(model, data, callbacks):
    callbacks = callbacks()
    epochs = 40 if len(callbacks) == 3 else 1
    with pytest.warns(UserWarning, match="'hidden' from 8 to .*FreezeBits"):
        model.fit(*data, epochs=epochs, verbose=0, callbacks=callbacks)


@pytest.mark.thorough
def test_the_guides_recipe_of_early_stopping_trains_at_the_frozen_bits(model, data):
    stop = keras.callbacks.EarlyStopping(
        "val_task_loss", mode="min", patience=1, start_from_epoch=7, restore_best_weights=True
    )
    callbacks = [klb.BitBudget(2.0), klb.FreezeBits(at=6), stop]
    model.fit(*data, validation_data=data, epochs=12, verbose=0, callbacks=callbacks)
    assert klb.bit_table(model).mean_bits <= 2


@pytest.mark.parametrize("part", ["x", *thorough("y")])
@pytest.mark.parametrize("value", [np.nan, *thorough(np.inf)])
def test_data_that_are_no_numbers_stop_training_before_weights_change(model, data, part, value):
    x, y = (array.copy() for array in data)
    (x if part == "x" else y)[5, 0] = value
    before = model.get_weights()
    with pytest.raises(tf.errors.InvalidArgumentError, match="Look for NaN in the data"):
        model.fit(x, y, batch_size=64, verbose=0)
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_sparse_gradients_are_checked_too():
    inputs = keras.Input((3,), dtype="int32")
    x = klb.LearnedBitEmbedding(5, 4)(inputs)
    model = klb.LearnedBitModel(inputs, klb.LearnedBitDense(1)(keras.layers.Flatten()(x)))
    model.compile("sgd", "mse")
    model.fit(np.ones((4, 3)), np.ones((4, 1)), verbose=0)
    with pytest.raises(tf.errors.InvalidArgumentError, match="Look for NaN"):
        model.fit(np.ones((4, 3)), np.full((4, 1), np.nan), verbose=0)


def test_evaluate_and_steps_on_batches_return_what_keras_returns(model, data):
    x, y = data
    plain = klb.to_keras(model)
    plain.compile("adam", "mse", metrics=["mae"])
    expected = plain.evaluate(x, y, verbose=0)
    _, error = model.evaluate(x, y, verbose=0)
    assert error == pytest.approx(expected[1], rel=1e-4)
    assert len(model.test_on_batch(x, y)) == len(model.train_on_batch(x, y)) == 2


def test_evaluate_of_a_loss_alone_returns_a_number(make_model, data):
    model = make_model()
    model.compile("adam", "mse")
    assert isinstance(model.evaluate(*data, verbose=0), float)


def test_evaluate_returns_all_parts_as_a_dictionary(model, data):
    logs = model.evaluate(*data, verbose=0, return_dict=True)
    parts = {"loss", "task_loss", "quantization_error", "mean_bits", "bit_reg", "mae"}
    assert set(logs) == parts
    assert logs["mean_bits"] == 8
    total = logs["task_loss"] + 0.5 * logs["quantization_error"] + 1e-3 * 8
    assert logs["loss"] == pytest.approx(total, rel=1e-5)
    assert set(model.test_on_batch(*data, return_dict=True)) == parts


def test_logs_have_no_copies_and_no_twins_of_what_does_not_depend_on_data(model, data):
    logs = model.fit(*data, validation_data=data, epochs=2, verbose=0).history
    names = ["loss", "task_loss", "mae"]
    of_data = {*names, *(f"val_{name}" for name in names)}
    assert set(logs) == of_data | {"quantization_error", "mean_bits", "bit_reg"}


class Auto(klb.LearnedBitModel):
    """A model with a custom loss."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        task = keras.ops.mean((x - y_pred) ** 2)
        return task + super().compute_loss(x, y, y_pred, sample_weight, training)


def test_a_custom_loss_of_a_class_needs_no_compiled_loss_and_is_logged_as_the_task(data):
    inputs = keras.Input((6,))
    model = Auto(inputs, klb.LearnedBitDense(6)(inputs))
    model.compile("adam", bit_reg=0.5)
    x = data[0]
    logs = model.evaluate(x, verbose=0, return_dict=True)
    expected = np.mean((x - model.predict(x, verbose=0)) ** 2)
    assert logs["task_loss"] == pytest.approx(expected, rel=1e-4)
    model.fit(x, verbose=0)


def test_without_a_custom_loss_a_model_needs_a_compiled_one(make_model, data):
    model = make_model()
    model.compile("adam")
    with pytest.raises(ValueError, match="No loss to compute"):
        model.fit(*data, verbose=0)


@pytest.mark.thorough
def test_a_layer_frozen_within_a_fit_counts_towards_the_budget(model, data):
    class Freeze(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                self.model.get_layer("head").trainable = False

    callbacks = [klb.BitBudget(3.0), klb.FreezeBits(at=6), Freeze()]
    model.fit(*data, batch_size=8, epochs=10, verbose=0, callbacks=callbacks)
    assert klb.bit_table(model).mean_bits <= 3.0


@pytest.mark.parametrize("update_freq", ["epoch", 3])
def test_one_chart_of_tensorboard_has_the_bits_of_all_layers(update_freq, model, data, tmp_path):
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    logger = klb.BitLogger(2, log_dir=str(tmp_path))
    # TensorBoard may write at other steps than the logger.
    tensorboard = keras.callbacks.TensorBoard(str(tmp_path), update_freq=update_freq)
    callbacks = [logger, tensorboard]
    model.fit(*data, batch_size=8, epochs=3, initial_epoch=1, verbose=0, callbacks=callbacks)
    events = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    for name, bits in zip(logger.names, zip(*logger.bits, strict=True), strict=True):
        curve = events.Tensors(f"bits/{name}", "bit-width [bits]")
        assert [event.step for event in curve] == logger.steps
        assert [float(tf.make_ndarray(event.tensor_proto)) for event in curve] == list(bits)
    assert len(logger.steps) > 3
