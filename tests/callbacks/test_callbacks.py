import contextlib
import csv
import glob

import keras
import numpy as np
import pytest
import tensorflow as tf
from thorough import thorough

import keras_learnbits as klb
from keras_learnbits.layers.discovery import quantized_kernels


def compiled(model, optimizer="adam", **settings):
    settings = {
        "bit_reg": 1.0,
        "bit_gradient": "straight_through",  # it moves every layer from the first step
        "bit_optimizer": klb.SignSGD(0.25),
        **settings,
    }
    model.compile(optimizer, "mse", **settings)
    return model


def curves_of(log_dir):
    """Dictionary of tag to list of (step, value) in the event files below a folder."""
    curves = {}
    for path in sorted(glob.glob(f"{log_dir}/**/events*", recursive=True)):
        for event in tf.compat.v1.train.summary_iterator(path):
            for value in event.summary.value:
                number = tf.make_ndarray(value.tensor)
                if number.ndim == 0 and number.dtype.kind == "f":
                    curves.setdefault(value.tag, []).append((event.step, float(number)))
    return curves


def test_event_files_hold_a_curve_of_bits_for_each_layer(make_model, data, tmp_path):
    model = compiled(make_model())
    tensorboard = keras.callbacks.TensorBoard(tmp_path)
    history = model.fit(
        *data, batch_size=32, epochs=3, callbacks=[klb.BitLogger(), tensorboard], verbose=0
    ).history
    curves = curves_of(tmp_path)
    assert curves["epoch_bits/hidden"] == [(0, 7.5), (1, 7.0), (2, 6.5)]
    assert curves["epoch_bits/head"] == [(0, 7.5), (1, 7.0), (2, 6.5)]
    assert history["bits/head"] == [7.5, 7.0, 6.5]
    errors = [value for _, value in curves["epoch_quantization_error/head"]]
    np.testing.assert_allclose(errors, history["quantization_error/head"], rtol=1e-6)
    kernel = model.get_layer("head").quantized_kernels["kernel"]
    np.testing.assert_allclose(
        errors[-1], kernel.squared_error() / kernel.squared_norm(), rtol=1e-5
    )


def test_step_wise_curves_follow_the_batches(make_model, data, tmp_path):
    model = compiled(make_model())
    logger = klb.BitLogger(update_freq=2)
    tensorboard = keras.callbacks.TensorBoard(tmp_path, update_freq=2)
    model.fit(*data, batch_size=8, callbacks=[logger, tensorboard], verbose=0)
    assert logger.names == ["hidden", "head"]
    assert logger.steps == [2, 4, 6, 8]
    assert logger.bits == [[7.5, 7.5], [7.0, 7.0], [6.5, 6.5], [6.0, 6.0]]
    values = [value for _, value in curves_of(tmp_path)["batch_bits/hidden"]]
    assert values
    assert set(values) <= {7.5, 7.0, 6.5, 6.0}


def test_the_csv_file_has_a_column_for_each_layer(make_model, data, tmp_path):
    model = compiled(make_model())
    csv_logger = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    model.fit(*data, batch_size=32, epochs=2, callbacks=[klb.BitLogger(), csv_logger], verbose=0)
    with open(tmp_path / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["bits/hidden"]) for row in rows] == [7.5, 7.0]
    assert all(float(row["loss"]) > float(row["task_loss"]) for row in rows)


@pytest.mark.thorough
def test_bits_of_layers_with_two_kernels_have_two_names(tmp_path):
    inputs = keras.Input((8, 8, 3))
    model = klb.LearnedBitModel(inputs, klb.LearnedBitSeparableConv2D(2, 3, name="sep")(inputs))
    compiled(model)
    x, y = np.ones((4, 8, 8, 3)), np.ones((4, 6, 6, 2))
    history = model.fit(x, y, callbacks=[klb.BitLogger()], verbose=0).history
    assert history["bits/sep/depthwise_kernel"] == [7.75]
    assert history["bits/sep/pointwise_kernel"] == [7.75]


def test_layers_of_the_same_name_are_distinguished_by_their_paths(data):
    class Block(keras.layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.dense = klb.LearnedBitDense(6, name="dense")

        def call(self, x):
            return self.dense(x)

    inputs = keras.Input((6,))
    outputs = klb.LearnedBitDense(2, name="head")(Block(name="b")(Block(name="a")(inputs)))
    model = compiled(klb.LearnedBitModel(inputs, outputs))
    history = model.fit(*data, callbacks=[klb.BitLogger()], verbose=0).history
    names = ["a/dense", "b/dense", "head"]
    assert [key for key in history if key.startswith("bits/")] == [f"bits/{n}" for n in names]
    assert [row.layer for row in klb.bit_table(model).rows] == names


@pytest.mark.thorough
def test_steps_are_training_steps_under_steps_per_execution(make_model, data):
    model = compiled(make_model(), steps_per_execution=4)
    logger = klb.BitLogger(update_freq=4)
    model.fit(*data, batch_size=8, epochs=2, callbacks=[logger], verbose=0)
    assert logger.steps == [4, 8, 12, 16]
    assert [bits[0] for bits in logger.bits] == [7.0, 6.0, 5.0, 4.0]


def test_steps_are_those_of_the_whole_training_where_it_goes_on(make_model, data):
    logger = klb.BitLogger(update_freq=4)
    model = compiled(make_model())
    model.fit(*data, batch_size=8, initial_epoch=2, epochs=4, callbacks=[logger], verbose=0)
    assert logger.steps == [20, 24, 28, 32]


@pytest.mark.parametrize("update_freq", [0, -1, "batch", 1.5])
def test_an_unknown_update_freq_is_refused(update_freq):
    with pytest.raises(ValueError, match="`update_freq` must be 'epoch' or a positive number"):
        klb.BitLogger(update_freq=update_freq)


@pytest.mark.parametrize("at", [0.5, *thorough(2)])
def test_freeze_bits_stops_them_at_integers(at, make_model, data):
    model = compiled(make_model(), bit_optimizer=klb.SignSGD(0.3))
    callbacks = [klb.FreezeBits(at=at), klb.BitLogger()]
    bits = model.fit(*data, epochs=4, callbacks=callbacks, verbose=0).history["bits/head"]
    np.testing.assert_allclose(bits[:2], [7.4, 6.8], rtol=1e-5)
    assert bits[2:] == [7.0, 7.0]


@pytest.mark.parametrize(("at", "epochs"), [(0.75, 1), (0.75, 3), *thorough((0.75, 2), (0.9, 5))])
def test_a_short_training_ends_frozen_with_its_last_epoch_for_the_weights(
    at, epochs, make_model, data
):
    model = compiled(make_model(), bit_optimizer=klb.SignSGD(0.1))
    callbacks = [klb.FreezeBits(at=at), klb.BitLogger()]
    bits = model.fit(*data, epochs=epochs, callbacks=callbacks, verbose=0).history["bits/head"]
    assert model.bits_are_frozen
    assert float(model.get_layer("head").bits).is_integer()
    assert [each.is_integer() for each in bits] == [False] * max(epochs - 1, 1) + [True] * (
        epochs > 1
    )


def test_early_stopping_ends_with_integers_although_it_restores_earlier_bits(make_model, data):
    model = compiled(make_model(), bit_optimizer=klb.SignSGD(0.1))
    stopping = keras.callbacks.EarlyStopping(
        "loss", patience=2, restore_best_weights=True, min_delta=1e9
    )
    model.fit(*data, epochs=6, callbacks=[stopping, klb.FreezeBits(at=1)], verbose=0)
    assert stopping.best_epoch == 0
    assert model.bits_are_frozen
    assert all(float(model.get_layer(name).bits).is_integer() for name in ("hidden", "head"))


@pytest.mark.thorough
def test_each_fit_begins_with_bits_that_move(make_model, data):
    model = compiled(make_model())
    logger = klb.BitLogger()
    for _ in range(2):  # 4 steps of 0.25 bits, then a frozen epoch
        callbacks = [klb.FreezeBits(at=1), logger]
        model.fit(*data, batch_size=16, epochs=2, callbacks=callbacks, verbose=0)
        assert model.bits_are_frozen
    assert [bits[1] for bits in logger.bits] == [7.0, 7.0, 6.0, 6.0]


def test_a_model_saved_in_the_freeze_stays_frozen(make_model, data, tmp_path):
    model = compiled(make_model())
    model.fit(*data, epochs=2, callbacks=[klb.FreezeBits(at=1)], verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    loaded.fit(*data, verbose=0)
    assert float(loaded.get_layer("head").bits) == float(model.get_layer("head").bits) == 8.0


@pytest.mark.parametrize("at", [-1, -0.5, 1.0, 1.5])
def test_freezing_at_no_time_is_refused(at):
    with pytest.raises(ValueError, match=f"`at` must be a fraction.*Received: at={at}"):
        klb.FreezeBits(at=at)


def test_freezing_a_plain_keras_model_is_refused(data):
    model = keras.Sequential([keras.Input((6,)), klb.LearnedBitDense(2)])
    model.compile("sgd", "mse")
    with pytest.raises(TypeError, match="do not train bits"):
        model.fit(*data, callbacks=[klb.FreezeBits()], verbose=0)


@pytest.mark.thorough
def test_freezing_works_on_two_replicas(strategy, make_model, data):
    with strategy.scope():
        model = compiled(make_model())
    callbacks = [klb.FreezeBits(at=1), klb.BitLogger()]
    bits = model.fit(*data, batch_size=32, epochs=2, callbacks=callbacks, verbose=0)
    assert bits.history["bits/head"] == [7.5, 8.0]


# Usual settings of optimizers work, and act on the weights only.


def test_learning_rate_scheduler_sets_the_weights_rate_only(make_model, data):
    model = compiled(make_model(), keras.optimizers.Adam(0.5))
    scheduler = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
    history = model.fit(*data, batch_size=64, epochs=2, callbacks=[scheduler], verbose=0).history
    assert history["learning_rate"] == [0.25, 0.125]
    assert float(model.get_layer("head").bits) == 8 - 2 * 0.25


@pytest.mark.thorough
def test_reduce_lr_on_plateau_acts_on_the_weights_rate_only(make_model, data):
    model = compiled(make_model(), keras.optimizers.SGD(0.5))
    x, y = data
    plateau = keras.callbacks.ReduceLROnPlateau(
        "task_loss", mode="min", factor=0.5, patience=1, min_delta=1e9
    )
    history = model.fit(x, y, batch_size=64, epochs=4, callbacks=[plateau], verbose=0).history
    assert history["learning_rate"] == [0.5, 0.5, 0.25, 0.125]
    assert float(model.optimizer.bit_optimizer.learning_rate) == 0.25


@pytest.mark.parametrize("policy", ["float32", *thorough("mixed_float16")])
def test_tensorboard_draws_the_weights_learning_rate(policy, make_model, data, tmp_path):
    keras.config.set_dtype_policy(policy)
    model = compiled(make_model(), keras.optimizers.Adam(0.5))
    scheduler = keras.callbacks.LearningRateScheduler(lambda epoch: 0.25)
    model.fit(*data, callbacks=[scheduler, keras.callbacks.TensorBoard(tmp_path)], verbose=0)
    assert curves_of(tmp_path)["epoch_learning_rate"] == [(0, 0.25)]


def test_early_stopping_restores_the_bits_with_the_best_weights(make_model, data):
    model = compiled(make_model())
    stopping = keras.callbacks.EarlyStopping(
        "task_loss", mode="max", patience=2, restore_best_weights=True, min_delta=1e9
    )
    history = model.fit(
        *data, batch_size=32, epochs=9, callbacks=[klb.BitLogger(), stopping], verbose=0
    ).history
    assert len(history["loss"]) == 3
    assert float(model.get_layer("head").bits) == history["bits/head"][0] == 7.5


def test_model_checkpoint_keeps_the_float_kernels_and_the_bits(make_model, data, tmp_path):
    model = compiled(make_model())
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras")
    model.fit(*data, batch_size=32, epochs=2, callbacks=[checkpoint], verbose=0)
    first = keras.models.load_model(tmp_path / "1.keras")
    second = keras.models.load_model(tmp_path / "2.keras")
    assert [float(k.bits) for k in quantized_kernels(first)] == [7.5, 7.5]
    for saved, now in zip(quantized_kernels(second), quantized_kernels(model), strict=True):
        np.testing.assert_array_equal(saved.kernel, now.kernel)
        assert float(saved.bits) == float(now.bits) == 7.0


def test_backup_and_restore_brings_back_bits_and_price(make_model, data, tmp_path):
    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def fit(model, *callbacks):
        model.fit(*data, batch_size=32, epochs=4, shuffle=False, verbose=0, callbacks=callbacks)
        return [v.numpy() for v in model.trainable_variables]

    uninterrupted = fit(compiled(make_model()))
    keras.utils.set_random_seed(1)
    with pytest.raises(KeyboardInterrupt):
        fit(compiled(make_model()), keras.callbacks.BackupAndRestore(tmp_path), Interrupt())
    resumed = fit(compiled(make_model()), keras.callbacks.BackupAndRestore(tmp_path))
    for before, after in zip(uninterrupted, resumed, strict=True):
        np.testing.assert_allclose(before, after, rtol=1e-6)


@pytest.mark.thorough
def test_at_the_freeze_each_layer_takes_the_cheaper_integer_next_to_its_latent_bits(
    make_model, data
):
    for price, rounded in ((0.0, 5), (1e6, 4)):
        model = make_model(bits=4)
        model.compile("sgd", "mse", bit_reg=price, bit_optimizer=klb.SignSGD(0.0))
        model.fit(*data, batch_size=8, epochs=3, verbose=0)
        kernel = quantized_kernels(model)[0]
        kernel.bits.assign(4.1 if rounded == 5 else 4.9)
        model.fit(*data, batch_size=64, callbacks=[klb.FreezeBits(at=0)], verbose=0)
        assert float(kernel.bits) == rounded


def test_the_weight_of_the_error_ramps_up_from_the_freeze_on(make_model, data):
    model = make_model()
    model.compile("sgd", "mse", quantization_reg=1.0)
    seen = []
    watch = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(float(model.quantization_reg))
    )
    freeze = klb.FreezeBits(at=0.5, quantization_reg=9.0)
    model.fit(*data, epochs=8, callbacks=[freeze, watch], verbose=0)
    np.testing.assert_allclose(seen, [1, 1, 1, 1, 3, 5, 7, 9])
    assert float(model.quantization_reg) == 1.0


@pytest.mark.parametrize("validate", [True, *thorough(False)])
def test_batch_norm_is_estimated_before_the_last_validation(validate, data):
    x, y = data
    inputs = keras.Input((6,))
    normalized = keras.layers.BatchNormalization(momentum=0.999)(inputs)
    model = klb.LearnedBitModel(inputs, klb.LearnedBitDense(2)(normalized))
    model.compile(keras.optimizers.SGD(0.0), "mse")
    batches = [x[:32], x[32:]]
    history = model.fit(
        *data, epochs=2, callbacks=[klb.FreezeBits(batch_norm_data=batches)], verbose=0,
        validation_data=data if validate else None,
    ).history  # fmt: skip
    means = np.mean([b.mean(axis=0) for b in batches], axis=0)
    np.testing.assert_allclose(model.layers[1].moving_mean, means, rtol=1e-3, atol=1e-5)
    if validate:
        np.testing.assert_allclose(
            history["val_loss"][-1],
            model.evaluate(x, y, verbose=0, return_dict=True)["loss"],
            rtol=1e-4,
        )


@pytest.mark.thorough
def test_batch_norm_is_estimated_for_the_averages_that_keras_leaves(data):
    x, _ = data
    inputs = keras.Input((6,))
    normalize = keras.layers.BatchNormalization(momentum=0.9)
    model = klb.LearnedBitModel(
        inputs, klb.LearnedBitDense(2)(normalize(klb.LearnedBitDense(4)(inputs)))
    )
    model.compile(keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9), "mse")
    batches = [x[:32], x[32:]]
    model.fit(
        *data, epochs=3, callbacks=[klb.FreezeBits(batch_norm_data=batches)], verbose=0,
        validation_data=data,
    )  # fmt: skip
    means = np.mean(model.layers[1](x), axis=0)
    np.testing.assert_allclose(normalize.moving_mean, means, rtol=1e-3, atol=1e-5)


@pytest.mark.thorough
def test_the_ramp_goes_on_where_it_was_interrupted(make_model, data, tmp_path):
    def train(epochs, backup):
        keras.utils.set_random_seed(0)
        model = compiled(make_model(), quantization_reg=0.01)
        weights = []

        def stop_or_note(epoch, logs):
            weights.append(float(keras.ops.convert_to_numpy(model.quantization_reg)))
            if epoch + 1 == epochs:
                raise KeyboardInterrupt

        callbacks = [
            keras.callbacks.BackupAndRestore(tmp_path / backup),
            klb.FreezeBits(at=2, quantization_reg=0.1),
            keras.callbacks.LambdaCallback(on_epoch_end=stop_or_note),
        ]
        with contextlib.suppress(KeyboardInterrupt):
            model.fit(*data, epochs=6, callbacks=callbacks, verbose=0)
        return weights, float(keras.ops.convert_to_numpy(model.quantization_reg))

    whole, after = train(None, "whole")
    first, _ = train(4, "parts")
    rest, after_rest = train(None, "parts")
    np.testing.assert_allclose(first[: 6 - len(rest)] + rest, whole)
    assert len(rest) < 6
    np.testing.assert_allclose([after, after_rest], 0.01)


@pytest.mark.thorough
@pytest.mark.parametrize("saved", [True, False])
def test_a_ramp_that_was_broken_off_begins_at_the_compiled_weight_again(
    saved, make_model, data, tmp_path
):
    seen = []

    def note_and_stop_at(last, model):
        def on_epoch_end(epoch, logs):
            seen.append(float(model.quantization_reg))
            if epoch == last:
                model.save(tmp_path / "model.keras")
                raise KeyboardInterrupt

        return keras.callbacks.LambdaCallback(on_epoch_end=on_epoch_end)

    model = compiled(make_model(), quantization_reg=1.0)
    for last, begin in ((5, 0), (None, 6 if saved else 0)):
        callbacks = [klb.FreezeBits(at=4, quantization_reg=9.0), note_and_stop_at(last, model)]
        with contextlib.suppress(KeyboardInterrupt):
            model.fit(*data, epochs=8, initial_epoch=begin, callbacks=callbacks, verbose=0)
        if last and saved:
            assert float(model.quantization_reg) == 1.0
            model = keras.models.load_model(tmp_path / "model.keras")
    whole = [1, 1, 1, 1, 3, 5, 7, 9]
    np.testing.assert_allclose(seen, whole if saved else whole[:6] + whole)
    assert float(model.quantization_reg) == 1.0


@pytest.mark.thorough
def test_a_weight_of_the_error_set_by_hand_stays_where_there_is_no_ramp(make_model, data):
    model = compiled(make_model(), quantization_reg=1.0)
    model.quantization_reg.assign(5.0)
    model.fit(*data, epochs=2, callbacks=[klb.FreezeBits(at=1)], verbose=0)
    assert float(model.quantization_reg) == 5.0
