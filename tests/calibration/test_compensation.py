"""Rounding that compensates, compared with NumPy and brute force."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from thorough import thorough

import keras_learnbits as klb
from keras_learnbits.calibration.compensation import Compensation
from keras_learnbits.calibration.layer_inputs import (
    as_matrices,
    from_matrices,
    gram_matrices,
    has_vectors,
)

L = keras.layers


def correlated_inputs(rng, count=200, size=6):
    return rng.normal(size=(count, 2)) @ rng.normal(size=(2, size)) + 0.1 * rng.normal(
        size=(count, size)
    )


def nearest(weights, step, offset, max_code):
    codes = np.clip(np.floor(weights / step - offset + 0.5), 0, max_code)
    return step * (codes + offset)


def error(weights, rounded, inputs):
    return np.square(inputs @ (weights - rounded)).sum()


@pytest.mark.parametrize("seed", range(5))
def test_outputs_change_less_than_with_the_nearest_levels(seed):
    rng = np.random.default_rng(seed)
    inputs, weights = correlated_inputs(rng), rng.normal(size=(6, 20))
    rounded = Compensation(inputs.T @ inputs)(weights, 1.0, -1.5, 3)
    plain = nearest(weights, 1.0, -1.5, 3)
    assert error(weights, rounded, inputs) < 0.7 * error(weights, plain, inputs)


def test_outputs_change_by_less_than_nearest_and_not_less_than_the_best_of_all_roundings():
    rng = np.random.default_rng(0)
    inputs, weights = correlated_inputs(rng, size=5), rng.normal(size=(5, 30))
    rounded = Compensation(inputs.T @ inputs)(weights, 1.0, -0.5, 1)
    levels = np.array(
        list(itertools.product([-0.5, 0.5], repeat=5))
    ).T  # all possible kernels of one output
    best = [
        min(error(column[:, None], each[:, None], inputs) for each in levels.T)
        for column in weights.T
    ]
    plain = error(weights, nearest(weights, 1.0, -0.5, 1), inputs)
    found = error(weights, rounded, inputs)
    assert sum(best) <= found < 0.8 * plain


def test_small_inputs_are_compensated_like_large_ones_despite_unused_ones():
    rng = np.random.default_rng(0)
    inputs = np.pad(correlated_inputs(rng), [[0, 0], [0, 2]])
    weights = rng.normal(size=(8, 20))
    large, small = (Compensation(unit**2 * inputs.T @ inputs) for unit in (1.0, 1e-3))
    np.testing.assert_array_equal(small(weights, 1.0, -1.5, 3), large(weights, 1.0, -1.5, 3))


def test_weights_of_independent_inputs_are_rounded_to_the_nearest_level():
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(6, 4))
    step, offset = np.array([0.5, 1.0, 0.7, 2.0]), -1.5
    rounded = Compensation(np.diag([3.0, 1.0, 2.0, 0.0, 5.0, 1.0]))(weights, step, offset, 3)
    np.testing.assert_allclose(rounded, nearest(weights, step, offset, 3))


@pytest.mark.parametrize("overflow", [np.inf, np.nan])
def test_weights_are_rounded_to_the_nearest_level_where_sums_of_squares_overflow(overflow):
    rng = np.random.default_rng(1)
    inputs, weights = correlated_inputs(rng), rng.normal(size=(6, 4))
    gram = inputs.T @ inputs
    gram[2, 3] = gram[3, 2] = gram[3, 3] = overflow
    np.testing.assert_allclose(
        Compensation(gram)(weights, 1.0, -1.5, 3), nearest(weights, 1.0, -1.5, 3)
    )


@pytest.mark.parametrize("size", [3, 64, 65, 200])
def test_all_weights_become_levels_whatever_the_size_of_blocks(size):
    rng = np.random.default_rng(2)
    inputs = rng.normal(size=(50, size))  # also fewer inputs than weights
    rounded = Compensation(inputs.T @ inputs)(rng.normal(size=(size, 3)), 0.5, -1.5, 3)
    assert set(np.unique(rounded)) <= {-0.75, -0.25, 0.25, 0.75}


LAYERS = {
    "dense": (klb.LearnedBitDense(3), (7, 5)),
    "convolution": (klb.LearnedBitConv2D(4, 3, strides=2, padding="same"), (9, 8, 3)),
    "dilated": (klb.LearnedBitConv2D(4, (3, 2), dilation_rate=2), (9, 8, 3)),
    "depthwise": (klb.LearnedBitDepthwiseConv2D(3, depth_multiplier=2), (6, 6, 4)),
    "convolution 1D": (klb.LearnedBitConv1D(4, 3, strides=2, padding="same"), (9, 3)),
    "causal": (klb.LearnedBitConv1D(4, 3, padding="causal", dilation_rate=2), (9, 3)),
    "depthwise 1D": (klb.LearnedBitDepthwiseConv1D(3, padding="same"), (9, 3)),
}


@pytest.mark.parametrize("name", ["depthwise", "causal", *thorough(*LAYERS)])
def test_gram_matrices_give_the_squared_outputs_that_keras_computes(name):
    layer, shape = LAYERS[name]
    x = np.random.default_rng(0).normal(size=(5, *shape)).astype("float32")
    layer(x)  # builds it
    assert has_vectors(layer)
    kernel = layer.quantized_kernels["kernel"].quantized().numpy()
    matrices = as_matrices(layer, kernel)
    grams = gram_matrices(layer, tf.constant(x)).numpy()
    squares = np.einsum("gio,gij,gjo->go", matrices, grams, matrices)
    outputs = layer(x).numpy()  # its bias is zero
    expected = np.square(outputs).sum(axis=tuple(range(outputs.ndim - 1)))
    np.testing.assert_allclose(squares.ravel(), expected, rtol=1e-4)
    np.testing.assert_array_equal(from_matrices(layer, matrices, kernel.shape), kernel)


def test_layers_of_another_form_are_rounded_to_nearest():
    layers = [
        (klb.LearnedBitConv2D(4, 3, groups=2), (8, 8, 4)),
        (klb.LearnedBitSeparableConv2D(4, 3), (8, 8, 4)),
        (klb.LearnedBitConv2DTranspose(4, 3), (8, 8, 4)),
        (klb.LearnedBitDense(1), (5001,)),
    ]
    layers.append((klb.LearnedBitDense(3, kernel_quantizer="min_max"), (5,)))
    for layer, shape in layers:
        layer.build((None, *shape))
        assert not has_vectors(layer)
