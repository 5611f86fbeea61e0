import numpy as np
import tensorflow as tf

from keras_learnbits.training import penalties

BITS = tf.constant([1.0, 2.5, 8.0])
SIZES = [100, 50, 10]
SHARES = tf.constant(SIZES, tf.float32) / 160


def test_mean_bits_is_storage_over_weights():
    expected = np.dot(BITS, SIZES) / np.sum(SIZES)
    np.testing.assert_allclose(
        tf.reduce_sum(penalties.mean_bits(BITS, SHARES)), expected, rtol=1e-6
    )


def test_a_bit_costs_a_layer_its_share_of_the_weights():
    with tf.GradientTape() as tape:
        tape.watch(BITS)
        price = penalties.mean_bits(BITS, SHARES)
    np.testing.assert_allclose(tape.gradient(price, BITS), np.divide(SIZES, 160), rtol=1e-6)


def test_levels_is_the_published_price():
    np.testing.assert_allclose(
        tf.reduce_sum(penalties.levels(BITS, SHARES)), (2.0 ** BITS.numpy()).sum(), rtol=1e-6
    )


def test_relative_error_of_a_kernel_of_zeros_is_zero():
    assert penalties.relative_error(tf.zeros(3), tf.zeros(3), SHARES) == 0


def test_relative_error_weighs_layers_by_their_size():
    errors, squared_norms = tf.constant([1.0, 2.0, 3.0]), tf.constant([10.0, 10.0, 10.0])
    expected = np.dot(errors, SIZES) / 10 / 160
    np.testing.assert_allclose(
        penalties.relative_error(errors, squared_norms, SHARES), expected, rtol=1e-6
    )


def test_no_layer_counts_more_than_one_and_its_error_still_pulls():
    errors = tf.constant([8.0, 2.0, 3.0])
    with tf.GradientTape() as tape:
        tape.watch(errors)
        error = penalties.relative_error(errors, tf.constant([4.0, 4.0, 0.0]), SHARES)
    np.testing.assert_allclose(error, np.dot([1.0, 0.5, 1.0], SIZES) / 160, rtol=1e-6)
    expected = np.divide([1 / 8, 1 / 4, 1 / 3], 160) * SIZES
    np.testing.assert_allclose(tape.gradient(error, errors), expected, rtol=1e-6)
