"""Kernels stay rounded while `evaluate` and `predict` run, and not a moment longer."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_learnbits as klb
from keras_learnbits.layers.tensors import quantized_kernels


class Counting(klb.LearnedScaleQuantizer):
    """Counts how often it rounds."""

    count = 0

    def quantize_with_error(self, *args, **kwargs):
        type(self).count += 1
        return super().quantize_with_error(*args, **kwargs)


@pytest.fixture
def make(data):
    """A function that makes a compiled model of two layers."""

    def make(**settings):
        inputs = keras.Input((6,))
        x = klb.LearnedBitDense(12, bits=3, kernel_quantizer=Counting(), name="a")(inputs)
        outputs = klb.LearnedBitDense(2, bits=3, kernel_quantizer=Counting(), name="b")(x)
        model = klb.LearnedBitModel(inputs, outputs)
        model.compile("adam", "mse", **settings)
        return model

    return make


@pytest.mark.parametrize("method", ["evaluate", "predict"])
def test_all_batches_share_one_rounding_of_each_kernel(make, data, method):
    model = make(run_eagerly=True)
    arguments = data if method == "evaluate" else data[:1]
    Counting.count = 0
    getattr(model, method)(*arguments, batch_size=8, verbose=0)
    assert Counting.count == 2


@pytest.mark.parametrize("settings", [{}, {"run_eagerly": True}, {"steps_per_execution": 3}])
def test_results_are_those_of_the_weights_at_hand_before_and_after_training(make, data, settings):
    x, y = data
    model = make(**settings)
    for _ in range(3):
        model.fit(x, y, epochs=1, verbose=0)
        expected = np.concatenate([model(x[i : i + 8]) for i in range(0, len(x), 8)])
        np.testing.assert_allclose(model.predict(x, batch_size=8, verbose=0), expected, atol=1e-6)
        loss = model.evaluate(x, y, batch_size=8, verbose=0, return_dict=True)["task_loss"]
        assert loss == pytest.approx(np.square(expected - y).mean(), rel=1e-4)
        np.testing.assert_allclose(model.predict_on_batch(x), expected, atol=1e-6)
    history = model.fit(x, y, validation_data=data, epochs=3, verbose=0).history
    assert len(set(history["val_loss"])) == 3


def test_the_memory_is_given_back_and_single_batches_keep_nothing(make, data):
    model = make()
    model.evaluate(*data, batch_size=8, verbose=0)
    with pytest.raises(RuntimeError, match="stopped"):
        model.predict(data[0], callbacks=[Stop()], verbose=0)
    model.predict_on_batch(data[0])
    model.test_on_batch(*data)
    kept = [variable for kernel in quantized_kernels(model) for variable in kernel.kept.variables]
    assert len(kept) == 6
    assert all(tf.size(variable) == 0 for variable in kept)


class Stop(keras.callbacks.Callback):
    def on_predict_batch_end(self, batch, logs=None):
        raise RuntimeError("stopped")


def test_replicas_round_for_themselves(strategy, make, data):
    with strategy.scope():
        model = make()
    expected = np.asarray(model(data[0]))
    np.testing.assert_allclose(model.predict(data[0], verbose=0), expected, atol=1e-6)
    model.evaluate(*data, verbose=0)
    assert all(kernel.kept is None for kernel in quantized_kernels(model))


def test_recurrent_layers_read_what_is_kept(data):
    inputs = keras.Input((5, 6))
    model = klb.to_learned_bits(keras.Model(inputs, keras.layers.LSTM(4)(inputs)), bits=3)
    model.compile("adam", "mse")
    x = np.random.default_rng(0).normal(size=(32, 5, 6)).astype("float32")
    expected = np.asarray(model(x))
    np.testing.assert_allclose(model.predict(x, batch_size=4, verbose=0), expected, atol=1e-6)
