import numpy as np
import pytest
import tensorflow as tf

from keras_learnbits.sensitivity import over_directions, sensitivities, updated

ENERGIES = np.array([4.0, 0.5, 10.0, 2.0], "float32")


def running_means(losses, errors, expected):
    """The means after so many looks, shapes `(looks, layers)`, with what was expected of each."""
    means = [np.zeros(losses.shape[1], "float32") for _ in range(4)]
    for look, (loss, error) in enumerate(zip(losses, errors, strict=True)):
        surprise = (loss - expected * error) ** 2 / error
        new = loss, error, surprise, np.ones_like(loss)
        means = [
            mean if place == 2 and look == 0 else updated(mean, value)
            for place, (mean, value) in enumerate(zip(means, new, strict=True))
        ]
    return [tf.constant(mean, tf.float32) for mean in means]


def looks(rng, truth, number, noise):
    """Looks at layers of these sensitivities, at widths that come down."""
    scales = np.array([0.1, 0.4, 0.9])[np.arange(number) % 3]
    errors = scales[:, None] * ENERGIES * rng.uniform(0.5, 2, (number, len(truth)))
    losses = truth * errors + noise * np.sqrt(errors) * rng.normal(size=errors.shape)
    return running_means(losses, errors, truth)


def test_without_noise_a_layer_is_what_it_has_shown():
    truth = np.array([0.1, 2.0, 0.03, 0.7])
    found, error = sensitivities(*looks(np.random.default_rng(0), truth, 6, 0.0), ENERGIES)
    np.testing.assert_allclose(found, truth, rtol=1e-4)
    assert np.max(error) < 1e-4


@pytest.mark.parametrize("number", [1, 2])
def test_before_three_looks_a_layer_is_as_sensitive_to_relative_error_as_all(number):
    truth = np.array([0.1, 2.0, 0.03, 0.7])
    means = looks(np.random.default_rng(0), truth, number, 0.0)
    found, error = sensitivities(*means, ENERGIES)
    common = np.sum(means[0]) / np.sum(means[1] / ENERGIES)
    np.testing.assert_allclose(found, common / ENERGIES, rtol=1e-5)
    assert np.all(np.isinf(error))


def test_with_noise_layers_are_nearer_to_the_truth_than_what_each_has_shown():
    rng = np.random.default_rng(1)
    truth = np.array([0.5, 2.0, 1.0, 0.7]) / ENERGIES
    wrong = {"shown": [], "found": []}
    for _ in range(100):
        means = looks(rng, truth, 7, 1.0)
        found, _ = sensitivities(*means, ENERGIES)
        wrong["shown"].append((means[0] / means[1] - truth) * ENERGIES)
        wrong["found"].append((found - truth) * ENERGIES)
        assert np.min(found) >= 0
    assert np.std(wrong["found"]) < 0.7 * np.std(wrong["shown"])


def test_the_standard_error_is_that_of_what_a_layer_has_shown_where_it_is_sure():
    rng = np.random.default_rng(2)
    truth = np.array([10.0, 20.0, 15.0, 12.0]) / ENERGIES
    found, errors = zip(
        *(sensitivities(*looks(rng, truth, 60, 0.3), ENERGIES) for _ in range(200)), strict=True
    )
    spread = np.std(np.array(found), axis=0)
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(errors), axis=0)), spread, rtol=0.4)


def test_a_layer_without_energy_or_looks_has_a_sensitivity_all_the_same():
    means = [tf.constant([0.5, 0.0, 0.3]) for _ in range(4)]
    found, error = sensitivities(*means, tf.constant([1.0, 2.0, 0.0]))
    assert np.all(np.isfinite(found))
    assert np.isinf(error[1])
    assert found[1] > 0


def test_one_bit_fewer_and_one_more_count_alike():
    losses, errors = over_directions(
        tf.constant([[0.4, -0.1], [0.4, 0.0]]), tf.constant([[3.0, -1.0], [3.0, 0.0]])
    )
    np.testing.assert_allclose(losses, [0.5, 0.4])
    np.testing.assert_allclose(errors, [4.0, 3.0])
