import numpy as np
import pytest
import tensorflow as tf
from thorough import thorough

from keras_learnbits.estimators.sensitivity import (
    UNKNOWN,
    over_directions,
    probe_variances,
    sensitivities,
    updated,
)

NORMS = np.array([4.0, 0.5, 10.0, 2.0], "float32")
# Relative errors that a probe adds: at a constant width, and with one bit fewer in each probe.
STAYING = np.full(7, 0.1)
FALLING = 1e-4 * 4.0 ** np.arange(7)


def means_after(losses, errors):
    """The running means after probes of shape `(probes, layers)`."""
    loss_changes, error_changes, variances, probed = np.zeros((4, losses.shape[1]), "float32")
    for probe, (loss, error) in enumerate(zip(losses, errors, strict=True)):
        if probe:
            before = (loss_changes, error_changes)
            new = probe_variances(*(tf.constant(a, tf.float32) for a in (loss, error, *before)))
            variances = updated(variances, new.numpy())
        loss_changes, error_changes = updated(loss_changes, loss), updated(error_changes, error)
        probed = updated(probed, np.ones_like(loss))
    means = loss_changes, error_changes, variances, probed
    return [tf.constant(mean, tf.float32) for mean in means]


def probed_means(rng, relative, shares, noise):
    """Means after probes of layers with these losses per relative error."""
    errors = shares[:, None] * NORMS
    losses = np.divide(relative, NORMS) * errors
    losses = losses + noise * np.sqrt(shares)[:, None] * rng.normal(size=errors.shape)
    return means_after(losses, errors)


def found_by(means, squared_norms=NORMS):
    """Sensitivities per relative error and their standard errors, NumPy arrays."""
    return (each.numpy() * squared_norms for each in sensitivities(*means, squared_norms))


TRUTH = np.array([0.4, 2.0, 0.3, 0.7])


@pytest.mark.parametrize("shares", [STAYING, FALLING], ids=["staying", "falling"])
def test_without_noise_a_layer_is_what_it_has_shown(shares):
    found, error = found_by(probed_means(np.random.default_rng(0), TRUTH, shares, 0.0))
    np.testing.assert_allclose(found, TRUTH, rtol=1e-3)
    assert np.max(error) < 1e-2


@pytest.mark.parametrize("number", [1, 2])
def test_before_three_probes_a_layer_is_as_sensitive_to_relative_error_as_all(number):
    found, error = found_by(probed_means(np.random.default_rng(0), TRUTH, STAYING[:number], 0.0))
    np.testing.assert_allclose(found, np.mean(TRUTH), rtol=1e-5)
    assert np.all(error >= 0.1 * UNKNOWN)


@pytest.mark.parametrize("shares", [STAYING, *thorough(FALLING)], ids=["staying", "falling"])
@pytest.mark.parametrize(("noise", "gain"), [(1.0, 0.9), *thorough((0.3, 1.0), (3.0, 0.7))])
def test_with_noise_layers_are_nearer_to_the_truth_than_what_each_has_shown(shares, noise, gain):
    rng = np.random.default_rng(1)
    of_shown, of_found = [], []
    for _ in range(200):
        truth = np.exp(rng.normal(-0.5, 0.8, 4))
        means = probed_means(rng, truth, shares, noise * np.sqrt(shares[-1]))
        shown = means[0] / means[1] * NORMS
        found, _ = found_by(means)
        of_shown.append((np.maximum(shown, 0) - truth) ** 2)
        of_found.append((found - truth) ** 2)
        assert np.min(found) >= 0
    assert np.mean(of_found) < gain * np.mean(of_shown)


@pytest.mark.parametrize("shares", [STAYING, *thorough(FALLING)], ids=["staying", "falling"])
def test_the_standard_error_is_not_below_that_of_what_a_layer_has_shown(shares):
    rng = np.random.default_rng(2)
    shown, squares = [], []
    for _ in range(400):
        means = probed_means(rng, TRUTH, shares, 0.3)
        shown.append(means[0] / means[1] * NORMS)
        squares.append(list(found_by(means))[1] ** 2)
    ratio = np.mean(squares, axis=0) / np.var(shown, axis=0)
    assert np.all(ratio > 1)
    assert np.all(ratio < 5)


def test_a_layer_of_mere_noise_does_not_hide_what_others_are_sure_of():
    ones = tf.ones(4)
    losses = tf.constant([-10.0, 1.0, 1.0, 1.0])
    variances = tf.constant([100.0, 1e-8, 1e-8, 1e-8])
    found, _ = sensitivities(losses, ones, variances, ones, ones)
    np.testing.assert_allclose(found[1:], 1.0, rtol=1e-2)
    assert 0 <= found[0] < 1.5


def test_a_layer_that_fewer_bits_help_does_not_hide_what_another_is_sure_of():
    ones = tf.ones(2)
    found, _ = sensitivities(tf.constant([7.0, -20.0]), ones, 1e-8 * ones, ones, ones)
    np.testing.assert_allclose(found, [7.0, 0.0], rtol=1e-3)


def test_layers_with_zero_norm_or_without_probes_have_a_sensitivity_too():
    probed = tf.constant([0.5, 0.0, 0.5])
    means = 0.2 * probed, probed, 0.01 * probed, probed
    found, error = sensitivities(*means, tf.constant([2.0, 2.0, 0.0]))
    assert np.all(np.isfinite(found))
    assert np.min(found) > 0
    np.testing.assert_array_equal(error >= 0.1 * UNKNOWN, [False, True, False])


def test_before_any_probe_nothing_is_known():
    found, error = sensitivities(*(tf.zeros(2) for _ in range(4)), tf.ones(2))
    np.testing.assert_array_equal(found, 0)
    assert np.all(error >= 0.1 * UNKNOWN)


def test_one_bit_fewer_and_one_more_count_alike():
    losses, errors = over_directions(
        tf.constant([[0.4, -0.1], [0.4, 0.0]]), tf.constant([[3.0, -1.0], [3.0, 0.0]])
    )
    np.testing.assert_allclose(losses, [0.5, 0.4])
    np.testing.assert_allclose(errors, [4.0, 3.0])
