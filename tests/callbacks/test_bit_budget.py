import contextlib
import itertools
import math
import re
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf
from thorough import thorough

import keras_learnbits as klb
from keras_learnbits.allocation import targets

# Trainings are short here, so bits reach a budget at their end.
pytestmark = pytest.mark.filterwarnings("ignore:Bit-widths were reduced when training ended")


@pytest.fixture
def deep_model(data):
    """A function that makes a compiled model of four layers, and the data it learns."""

    def make(**settings):
        inputs = x = keras.Input((6,))
        for name, units in (("a", 12), ("b", 20), ("c", 10)):
            x = klb.LearnedBitDense(units, activation="relu", name=name)(x)
        model = klb.LearnedBitModel(inputs, klb.LearnedBitDense(2, name="d")(x))
        defaults = {
            "bit_gradient": klb.bit_gradients.Measured(interval=10),
            "bit_optimizer": klb.SignSGD(0.1),
        }
        model.compile("adam", "mse", metrics=["mae", "r2_score"], **{**defaults, **settings})
        return model

    return make


def fit(model, data, *callbacks, epochs=8):
    return model.fit(*data, batch_size=8, epochs=epochs, callbacks=list(callbacks), verbose=0)


@pytest.mark.parametrize("target", [2.0, *thorough(1.3, 3.1, 5.0)])
def test_mean_bits_end_within_one_step_of_the_target_and_never_above(target, deep_model, data):
    model = deep_model()
    history = fit(model, data, klb.BitBudget(target_bits=target), klb.FreezeBits(at=0.75)).history
    table = klb.bit_table(model)
    room = min(row.weights for row in table.rows if row.bits < 8) / table.weights
    assert target - room < table.mean_bits <= target
    assert history["mean_bits"][-1] == pytest.approx(table.mean_bits)


@pytest.mark.thorough
def test_five_byte_budgets_are_kept_and_used(deep_model, data):
    model = deep_model()
    fit(model, data, epochs=2)
    budget = klb.BitBudget(target_bytes=10_000)
    budget.set_model(model)
    low, high = (
        klb.bit_table(model).packed_bytes
        + sum(
            math.ceil(row.weights * bits / 8) - row.code_bytes for row in klb.bit_table(model).rows
        )
        for bits in (1, 8)
    )
    for target in np.linspace(low, high, 5).astype(int):
        budget = klb.BitBudget(target_bytes=int(target))
        budget.set_model(model)
        model.freeze_bits(budget.allocate())
        assert 0.97 * target <= klb.bit_table(model).packed_bytes <= target
    with pytest.raises(ValueError, match=f"lowest bit-widths reach: {low} bytes"):
        fit(model, data, klb.BitBudget(target_bytes=int(low) - 1), epochs=1)


def test_an_allocation_is_the_best_of_all_within_the_budget(deep_model, data):
    model = deep_model()
    fit(model, data, epochs=4)
    kernels, losses = model.predicted_losses()
    sizes = [kernel.size for kernel in kernels]
    for target in (1.5, 2.6, 4.4):
        budget = klb.BitBudget(target_bits=target)
        budget.set_model(model)
        widths = budget.allocate()
        bits = [widths[kernel] for kernel in kernels]
        best = min(
            sum(losses[layer, b - 1] for layer, b in enumerate(widths))
            for widths in itertools.product(range(1, 9), repeat=4)
            if np.dot(widths, sizes) <= target * sum(sizes)
        )
        assert np.dot(bits, sizes) <= target * sum(sizes)
        assert sum(losses[layer, b - 1] for layer, b in enumerate(bits)) == pytest.approx(best)


@pytest.mark.thorough
def test_a_compression_is_reached(deep_model, data):
    model = deep_model()
    fit(model, data, klb.BitBudget(target_compression=5.0), klb.FreezeBits())
    assert 5.0 <= klb.bit_table(model).compression < 5.3


@pytest.mark.thorough
def test_the_price_neither_winds_up_nor_levels_the_layers(deep_model, data):
    model = deep_model()
    logger = klb.BitLogger()
    history = fit(model, data, klb.BitBudget(target_bits=2.5), logger, klb.FreezeBits(), epochs=16)
    prices = history.history["bit_reg"]
    assert max(prices) < 10  # early probes are noisy; the task's loss is about 2
    assert prices[-1] < 1
    assert len({row.bits for row in klb.bit_table(model).rows}) > 1
    assert logger.bits[1] != logger.bits[6]


def test_without_a_freeze_the_target_holds_at_the_end_of_training(deep_model, data):
    model = deep_model(bit_optimizer=klb.SignSGD(1e-4))  # too slow to reach the target
    fit(model, data, klb.BitBudget(target_bits=2.0), epochs=1)
    assert klb.bit_table(model).mean_bits <= 2.0
    assert model.bits_are_frozen


def test_layers_that_are_not_trained_count_and_keep_their_bits(deep_model, data):
    model = deep_model()
    model.get_layer("b").trainable = False
    model.compile("adam", "mse", bit_optimizer=klb.SignSGD(0.1))
    fit(model, data, klb.BitBudget(target_bits=5.0), klb.FreezeBits())
    table = klb.bit_table(model)
    assert {row.layer: row.bits for row in table.rows}["b"] == 8
    assert 4.8 < table.mean_bits <= 5.0


def test_a_permitted_accuracy_drop_bounds_the_metric_at_the_freeze(data):
    x, y = data
    labels = (y[:, 0] > 0).astype("int32")
    inputs = keras.Input((6,))
    hidden = klb.LearnedBitDense(16, activation="relu")(inputs)
    model = klb.LearnedBitModel(inputs, klb.LearnedBitDense(2)(hidden))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"], bit_optimizer=klb.SignSGD(0.1))
    model.fit(x, labels, batch_size=8, epochs=30, verbose=0)
    reference = model.evaluate(x, labels, verbose=0, return_dict=True)["accuracy"]
    budget = klb.BitBudget(
        max_accuracy_drop=0.05, float_accuracy=reference, validation_data=(x, labels)
    )
    model.fit(x, labels, batch_size=8, epochs=6, callbacks=[budget], verbose=0)
    table = klb.bit_table(model)
    assert table.mean_bits < 8
    assert model.evaluate(x, labels, verbose=0, return_dict=True)["accuracy"] >= reference - 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of target_bits, .* Received: {}"),
        ({"target_bits": 2, "target_bytes": 9}, "'target_bits': 2, 'target_bytes': 9"),
        ({"target_bits": -1}, "Received: {'target_bits': -1}"),
        ({"target_bits": float("nan")}, "nan"),
        ({"target_bits": 2, "by": 1.0}, "Received: by=1.0"),
        ({"max_accuracy_drop": 0.1}, "must not be the test set"),
    ],
    ids=str,
)
def test_a_wrong_target_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        klb.BitBudget(**arguments)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("generator", "read several times.*Received: generator"),
        ("list_iterator", "read several times.*Received: list_iterator"),
        ("endless", r"without `repeat\(\)`.*Received: an endless"),
        ("number", "Received: an object of type int"),
    ],
)
def test_validation_data_that_end_never_or_once_are_refused_before_training(kind, message, data):
    validation_data = {
        "generator": (batch for batch in [data]),
        "list_iterator": iter([data]),
        "endless": tf.data.Dataset.from_tensors(data).repeat(),
        "number": 7,
    }[kind]
    with pytest.raises(ValueError, match=message):
        klb.BitBudget(max_accuracy_drop=0.1, float_accuracy=1, validation_data=validation_data)


def test_an_infeasible_target_names_the_smallest(deep_model, data):
    with pytest.raises(ValueError, match=r"reach: 1.0 bits. Received: target_bits=0.5"):
        fit(deep_model(), data, klb.BitBudget(target_bits=0.5))
    with pytest.raises(ValueError, match=r"`target_compression` must be feasible"):
        fit(deep_model(), data, klb.BitBudget(target_compression=1000))


def test_a_budget_needs_predicted_losses(deep_model, data):
    model = deep_model(bit_gradient="straight_through")
    with pytest.raises(ValueError, match="'measured' or 'difference'"):
        fit(model, data, klb.BitBudget(target_bits=2))


def test_a_budget_in_a_plain_model_is_refused(data):
    model = keras.Sequential([keras.Input((6,)), klb.LearnedBitDense(2)])
    model.compile("sgd", "mse")
    with pytest.raises(TypeError, match="`BitBudget` needs a LearnedBitModel"):
        fit(model, data, klb.BitBudget(target_bits=2))


@pytest.mark.thorough
def test_a_second_fit_reaches_a_second_target(deep_model, data):
    model = deep_model()
    for target in (4.0, 2.0):
        fit(model, data, klb.BitBudget(target_bits=target), epochs=2)
        assert target - 0.5 < klb.bit_table(model).mean_bits <= target


@pytest.mark.thorough
def test_a_budget_outlives_restored_weights(deep_model, data):
    model = deep_model()
    stopping = keras.callbacks.EarlyStopping(
        "task_loss", mode="max", patience=4, restore_best_weights=True, min_delta=1e9
    )
    fit(model, data, stopping, klb.BitBudget(target_bits=2.0, by=0.2), klb.FreezeBits(at=2))
    assert klb.bit_table(model).mean_bits <= 2.0


def test_a_training_stopped_early_ends_within_the_target(deep_model, data):
    model = deep_model()
    stop = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: setattr(model, "stop_training", epoch == 1)
    )
    fit(model, data, klb.BitBudget(target_bits=2.0), klb.FreezeBits(at=0.75), stop)
    assert klb.bit_table(model).mean_bits <= 2.0
    assert model.bits_are_frozen


@pytest.mark.thorough
def test_a_model_that_its_first_step_builds_has_a_budget(data):
    layers = [klb.LearnedBitDense(20, activation="relu"), klb.LearnedBitDense(2)]
    model = klb.LearnedBitSequential(layers)
    model.compile("adam", "mse", bit_optimizer=klb.SignSGD(0.1))
    fit(model, data, klb.BitBudget(target_bits=3.0), klb.FreezeBits())
    assert 2.0 < klb.bit_table(model).mean_bits <= 3.0


@pytest.mark.thorough
def test_the_price_is_steered_under_steps_per_execution(deep_model, data):
    model = deep_model(steps_per_execution=4)
    prices = fit(model, data, klb.BitBudget(target_bits=2.0, update_freq=10)).history["bit_reg"]
    assert len(set(prices)) > 3


@pytest.mark.thorough
def test_a_budget_holds_on_two_replicas(strategy, deep_model, data):
    with strategy.scope():
        model = deep_model()
    fit(model, data, klb.BitBudget(target_bits=2.0), klb.FreezeBits(), epochs=4)
    assert 1.5 < klb.bit_table(model).mean_bits <= 2.0


@pytest.mark.thorough
def test_an_unreachable_accuracy_is_warned_of_and_a_wrong_metric_refused(deep_model, data):
    model = deep_model()
    settings = {"max_accuracy_drop": 0.0, "float_accuracy": 1e9, "validation_data": data}
    with pytest.warns(UserWarning, match="Even at the highest bit-widths `r2_score` is"):
        fit(model, data, klb.BitBudget(metric="r2_score", **settings), epochs=1)
    assert klb.bit_table(model).mean_bits == 8
    with pytest.raises(ValueError, match="Received: metric='typo'"):
        fit(model, data, klb.BitBudget(metric="typo", **settings))


@pytest.mark.parametrize("kind", ["target_compression", *thorough("target_bits", "target_bytes")])
def test_the_smallest_target_that_the_error_names_is_taken(kind, data):
    layers = [klb.LearnedBitDense(4), klb.LearnedBitDense(2, min_bits=2)]
    model = klb.LearnedBitSequential([keras.Input((6,)), *layers])
    model.compile("adam", "mse")
    impossible = 1e9 if kind == "target_compression" else 1e-9
    with pytest.raises(ValueError, match="lowest bit-widths reach") as refused:
        model.fit(*data, callbacks=[klb.BitBudget(**{kind: impossible})], verbose=0)
    named = float(re.search(r"reach: ([0-9.]+)", str(refused.value)).group(1))
    model.fit(*data, callbacks=[klb.BitBudget(**{kind: named}), klb.FreezeBits()], verbose=0)
    assert [row.bits for row in klb.bit_table(model).rows] == [1, 2]


@pytest.mark.thorough
def test_validation_data_may_have_sample_weights(data):
    x, y = data
    model = klb.LearnedBitSequential([keras.Input((6,)), klb.LearnedBitDense(2)])
    model.compile("adam", "mse", metrics=["r2_score"], weighted_metrics=[])
    budget = klb.BitBudget(
        max_accuracy_drop=10.0,
        float_accuracy=1.0,
        validation_data=(x, y, np.ones(len(x))),
        metric="r2_score",
    )
    model.fit(x, y, batch_size=4, epochs=2, callbacks=[budget], verbose=0)
    assert model.bits_are_frozen


@pytest.mark.thorough
def test_epochs_shorter_than_the_interval_of_the_budget_are_steered(deep_model, data):
    model = deep_model(bit_gradient=klb.bit_gradients.Measured(interval=1))
    prices = []
    note = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: prices.append(float(model.bit_reg.numpy()))
    )
    budget = klb.BitBudget(target_bits=2.0, update_freq=10**6)
    model.fit(*data, batch_size=8, epochs=6, callbacks=[budget, note], verbose=0)
    assert len(set(prices)) > 2


@pytest.mark.thorough
@pytest.mark.parametrize("backup_at", [0, 1, 2])
def test_a_frozen_training_that_goes_on_keeps_its_bits_if_the_target_permits(
    backup_at, deep_model, data, tmp_path
):
    settled = [1, 3, 3, 8]  # only the training so far favours these widths

    def train(target, folder, epoch_to_stop_at):
        def settle_or_stop(epoch, logs):
            if epoch == 5 and epoch_to_stop_at:
                model.freeze_bits(settled)
            if epoch == epoch_to_stop_at:
                raise KeyboardInterrupt

        model = deep_model()
        callbacks = [klb.BitBudget(target), klb.FreezeBits(at=0.5)]
        backup = keras.callbacks.BackupAndRestore(folder, delete_checkpoint=False)
        callbacks.insert(backup_at, backup)
        callbacks.append(keras.callbacks.LambdaCallback(on_epoch_begin=settle_or_stop))
        with contextlib.suppress(KeyboardInterrupt):
            fit(model, data, *callbacks)
        return klb.bit_table(model)

    train(3.0, tmp_path / "stopped", epoch_to_stop_at=6)
    for target, kept in ((3.0, True), (2.0, False)):
        folder = shutil.copytree(tmp_path / "stopped", tmp_path / str(target))
        table = train(target, folder, epoch_to_stop_at=None)
        assert ([row.bits for row in table.rows] == settled) == kept
        assert table.mean_bits <= target


def test_every_target_that_names_a_size_permits_it(deep_model, monkeypatch):
    model = deep_model()
    table = klb.bit_table(model)
    monkeypatch.setattr(targets, "bit_table", lambda model: table)  # it takes long
    for size in range(table.packed_bytes // 4, table.packed_bytes, 3):
        compression = targets.CompressionTarget(1.0)
        compression.value = compression.describe(model, size)
        assert compression.limit(model) >= size
        bits = targets.BitsTarget(1.0)
        bits.value = bits.describe(model, size)
        assert bits.limit(model) >= size


@pytest.mark.parametrize("budget_first", [True, False])
def test_frozen_bits_within_the_target_are_kept_where_no_epoch_is_left(
    budget_first, deep_model, data
):
    model = deep_model()
    callbacks = [klb.BitBudget(3.0), klb.FreezeBits(0.5)][:: 1 if budget_first else -1]
    model.freeze_bits([2, 1, 2, 4])  # the target permits them, and would permit more
    model.fit(*data, initial_epoch=8, epochs=8, callbacks=callbacks, verbose=0)
    assert [float(t.bits) for t in model.quantized_tensors] == [2, 1, 2, 4]
    model.freeze_bits([8, 8, 8, 8])
    model.fit(*data, initial_epoch=8, epochs=8, callbacks=callbacks, verbose=0)
    assert klb.bit_table(model).mean_bits <= 3


@pytest.mark.thorough
def test_the_compiled_price_is_back_when_the_budget_has_done_its_work(deep_model, data):
    model = deep_model(bit_reg=0.25)
    history = fit(model, data, klb.BitBudget(2.0), klb.FreezeBits(0.5)).history
    assert history["bit_reg"][-1] != 0.25
    assert float(model.bit_reg) == 0.25


@pytest.mark.thorough
def test_a_descent_that_goes_on_does_not_drop_at_once(deep_model, data, tmp_path):
    def train(epoch_to_stop_at, backup, backup_at=0):
        def note_or_stop(epoch, logs):
            sizes.append(klb.bit_table(model).mean_bits)
            if epoch + 1 == epoch_to_stop_at:
                raise KeyboardInterrupt

        keras.utils.set_random_seed(0)
        # With a probe in each step, bits follow the price at once.
        estimator = klb.bit_gradients.Measured(interval=1)
        sizes, model = [], deep_model(bit_gradient=estimator, bit_optimizer=klb.SignSGD(0.5))
        callbacks = [klb.BitBudget(1.5, by=0.75, update_freq=4), klb.FreezeBits(0.875)]
        restore = keras.callbacks.BackupAndRestore(tmp_path / backup, delete_checkpoint=False)
        callbacks.insert(backup_at, restore)
        callbacks.append(keras.callbacks.LambdaCallback(on_epoch_end=note_or_stop))
        with contextlib.suppress(KeyboardInterrupt):
            fit(model, data, *callbacks, epochs=16)
        return sizes

    whole = train(None, "whole")
    for backup_at in (0, 2):
        train(6, f"parts{backup_at}", backup_at)
        rest = train(None, f"parts{backup_at}", backup_at)
        assert 8 < len(rest) < 16
        assert rest[0] == pytest.approx(whole[-len(rest)], abs=0.6)
