"""The fused batch normalization of the experiments is Keras's."""

import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def fused(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    import nets

    return nets.BatchNormalization


def results(layer, inputs):
    """Outputs, weights after a training step, and gradients."""
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = layer(inputs, training=True)
        loss = tf.reduce_sum(tf.cast(outputs, tf.float32) ** 3)
    variables = [inputs, *(variable.value for variable in layer.trainable_variables)]
    return [outputs, *(weight.value for weight in layer.weights), *tape.gradient(loss, variables)]


@pytest.mark.parametrize(("policy", "tolerance"), [("float32", 1e-5), ("mixed_bfloat16", 1e-2)])
def test_outputs_statistics_and_gradients_are_those_of_the_keras_layer(fused, policy, tolerance):
    rng = np.random.default_rng(0)
    inputs = tf.constant(rng.normal(2, 3, (16, 8, 8, 5)), tf.float32)
    found, expected = [], []
    for cls, arrays in ((fused, found), (keras.layers.BatchNormalization, expected)):
        layer = cls(momentum=0.9, dtype=policy)
        layer.build(inputs.shape)
        layer.gamma.assign([1, 2, 3, 0.5, -1])
        layer.beta.assign([0.1, 0.2, 0.3, 0.4, 0.5])
        arrays += results(layer, inputs)
    for one, other in zip(found, expected, strict=True):
        one, other = (tf.cast(each, tf.float32).numpy() for each in (one, other))
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * np.abs(other).max())


def test_files_hold_the_keras_layer(fused, tmp_path):
    model = keras.Sequential([keras.Input((8, 8, 3)), fused()])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.layers[-1]) is keras.layers.BatchNormalization
