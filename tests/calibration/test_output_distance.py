"""Distances of outputs, compared with NumPy."""

import keras
import numpy as np
import pytest
from scipy.special import expit, softmax

from keras_learnbits.calibration.output_distance import OutputDistance, agreement

RNG = np.random.default_rng(0)
LOGITS, OTHERS = RNG.normal(size=(2, 50, 4)).astype("float32")


def relative(found, expected):
    return np.mean(np.square(found - expected) / expected.var(axis=0))


def test_differences_are_in_units_of_each_channels_variance():
    distance = OutputDistance(LOGITS * [1, 100, 1, 1] + 7)
    found = distance(OTHERS * [1, 100, 1, 1], LOGITS * [1, 100, 1, 1])
    assert float(found) == pytest.approx(relative(OTHERS, LOGITS), rel=1e-4)


def test_probabilities_behind_a_softmax_are_as_far_apart_as_their_centred_logits():
    distance = OutputDistance(softmax(LOGITS, axis=-1))
    found = distance(softmax(OTHERS, axis=-1), softmax(LOGITS, axis=-1))
    a, b = (each - each.mean(axis=-1, keepdims=True) for each in (OTHERS, LOGITS))
    assert float(found) == pytest.approx(relative(a, b), rel=1e-3)


@pytest.mark.parametrize("separate", [False, True])
def test_probabilities_behind_a_sigmoid_are_as_far_apart_as_their_logits(separate):
    inputs = keras.Input((4,))
    if separate:
        outputs = keras.layers.Activation("sigmoid")(keras.layers.Dense(4)(inputs))
    else:
        outputs = keras.layers.Dense(4, activation="sigmoid")(inputs)
    distance = OutputDistance(expit(LOGITS), keras.Model(inputs, outputs))
    found = distance(expit(OTHERS), expit(LOGITS))
    assert float(found) == pytest.approx(relative(OTHERS, LOGITS), rel=1e-3)


def test_several_outputs_count_alike_and_integers_do_not_count():
    reference = {"a": LOGITS, "b": 100 * LOGITS[:, 0], "class": LOGITS.argmax(axis=-1)}
    outputs = {"a": OTHERS, "b": 100 * OTHERS[:, 0], "class": OTHERS.argmax(axis=-1)}
    found = OutputDistance(reference)(outputs, reference)
    expected = (relative(OTHERS, LOGITS) + relative(OTHERS[:, 0], LOGITS[:, 0])) / 2
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_a_channel_that_never_changes_does_not_count_without_bounds():
    reference = LOGITS * [1, 1, 1, 0]
    found = OutputDistance(reference)(reference + np.eye(4)[3], reference)
    mean_variance = LOGITS[:, :3].var(axis=0).mean()
    assert float(found) == pytest.approx(1 / 4 / mean_variance, rel=1e-3)


@pytest.mark.parametrize("unit", [1e-30, 1e-5, 1e5, 1e30])
def test_a_channel_in_another_unit_counts_as_the_others(unit):
    units = np.array([1, 1, unit, 1], "float32")
    found = OutputDistance(LOGITS * units)(OTHERS * units, LOGITS * units)
    assert float(found) == pytest.approx(relative(OTHERS, LOGITS), rel=1e-4)


def test_a_unit_that_is_hardly_ever_active_does_not_outweigh_the_others():
    reference = np.tile(LOGITS, (10, 1))
    reference[:, 3] = 0
    reference[7, 3] = 1e-6
    found = OutputDistance(reference)(reference + 0.1 * np.eye(4)[3], reference)
    expected = 0.01 / 4 / reference[:, :3].var(axis=0).mean()
    assert float(found) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("noise", [0, 1e-7])
def test_of_constant_outputs_the_change_is_relative_to_their_size(noise):
    reference = 3 + noise * LOGITS
    distance = OutputDistance(reference)
    assert distance.constant
    assert float(distance(reference + 0.3, reference)) == pytest.approx(0.01, rel=1e-3)
    assert not OutputDistance({"a": reference, "b": LOGITS}).constant


def test_a_model_with_integer_outputs_only_is_refused():
    with pytest.raises(ValueError, match="must have a float output"):
        OutputDistance(LOGITS.argmax(axis=-1))


def test_outputs_in_half_precision_count_and_those_that_are_not_finite_are_refused():
    half = keras.ops.cast(LOGITS, "bfloat16").numpy()
    found = OutputDistance(half)(OTHERS, half)
    assert float(found) == pytest.approx(relative(OTHERS, LOGITS), rel=0.02)
    with pytest.raises(ValueError, match="must be finite on the example inputs"):
        OutputDistance(np.where(LOGITS > 2, np.nan, LOGITS))


def test_agreement_is_the_share_of_equal_classes():
    outputs = np.eye(4)[[0, 1, 2, 3]]
    assert agreement(outputs, np.eye(4)[[0, 1, 2, 0]]) == 0.75
    assert agreement(outputs[:, :1], outputs[:, :1]) is None
