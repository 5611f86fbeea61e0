import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_learnbits.calibration.batch_norm import estimate_batch_norm


@pytest.fixture
def batches():
    rng = np.random.default_rng(0)
    return [rng.normal(i, 1 + i, size=(16, 3)).astype("float32") for i in range(4)]


@pytest.fixture
def model():
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(5, activation="relu"),
            keras.Sequential([keras.layers.BatchNormalization(momentum=0.5)]),
        ]
    )
    model(np.zeros((1, 3)))
    return model


def test_statistics_are_the_mean_of_the_batches(model, batches):
    estimate_batch_norm(model, batches)
    means = np.mean([b.mean(axis=0) for b in batches], axis=0)
    variances = np.mean([b.var(axis=0) for b in batches], axis=0)
    np.testing.assert_allclose(model.layers[0].moving_mean, means, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.layers[0].moving_variance, variances, rtol=1e-4)


def test_nested_layers_are_reached_and_nothing_else_changes(model, batches):
    inner = model.layers[-1].layers[0]
    before = {v.path: v.numpy() for v in model.variables}
    estimate_batch_norm(model, tf.data.Dataset.from_tensor_slices((np.array(batches),)))
    assert np.abs(inner.moving_mean - before[inner.moving_mean.path]).max() > 0
    moving = {v.path for bn in (model.layers[0], inner) for v in bn.non_trainable_variables}
    for variable in model.variables:
        if variable.path not in moving:
            np.testing.assert_array_equal(variable, before[variable.path])


def test_no_data_are_refused(model):
    with pytest.raises(ValueError, match="at least one batch"):
        estimate_batch_norm(model, [])


def test_a_model_without_batch_norm_needs_none():
    estimate_batch_norm(keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]), [])


def test_statistics_that_training_leaves_alone_are_left_alone(batches):
    layers = [keras.Input((3,)), keras.layers.BatchNormalization(trainable=False)]
    model = keras.Sequential(layers)
    estimate_batch_norm(model, batches)
    np.testing.assert_array_equal(model.layers[0].moving_mean, np.zeros(3))
    np.testing.assert_array_equal(model.layers[0].moving_variance, np.ones(3))


def test_frozen_layers_use_and_keep_their_statistics_meanwhile(batches):
    kept = keras.layers.BatchNormalization(trainable=False)
    live = keras.layers.BatchNormalization(momentum=0.9)
    model = keras.Sequential([keras.Input((3,)), kept, live])
    kept.moving_mean.assign([1.0, 2.0, 3.0])
    kept.moving_variance.assign([4.0, 5.0, 6.0])
    estimate_batch_norm(model, batches)
    normalized = [(b - [1, 2, 3]) / np.sqrt(np.array([4, 5, 6]) + 1e-3) for b in batches]
    means = np.mean([n.mean(axis=0) for n in normalized], axis=0)
    variances = np.mean([n.var(axis=0) for n in normalized], axis=0)
    np.testing.assert_allclose(live.moving_mean, means, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(live.moving_variance, variances, rtol=1e-4)
    np.testing.assert_array_equal(kept.moving_mean, [1, 2, 3])
    np.testing.assert_array_equal(kept.moving_variance, [4, 5, 6])


def test_a_momentum_of_one_keeps_the_statistics(batches):
    model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(momentum=1.0)])
    estimate_batch_norm(model, batches)
    np.testing.assert_array_equal(model.layers[0].moving_variance, np.ones(3))
