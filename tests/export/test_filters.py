import itertools

import numpy as np
import pytest

from keras_learnbits.export._filters import exact_integers, find_kernel, nearest_integers
from keras_learnbits.layers.stored_kernel import StoredKernel

SHAPE = (2, 3, 4, 5)


def stored(bits, shape=SHAPE, seed=0, offset=None):
    rng = np.random.default_rng([bits, seed])
    codes = rng.integers(0, 2**bits, shape).astype("int32")
    step = rng.uniform(0.1, 2, (1,) * (len(shape) - 1) + shape[-1:]).astype("float32")
    offset = -0.5 * (2**bits - 1) if offset is None else offset
    return StoredKernel("kernel", bits, codes, step, np.full_like(step, offset))


def scaled(filter_, axis, factors):
    """A filter whose channels were multiplied in float32, as a batch normalization does."""
    shape = [-1 if each == axis else 1 for each in range(filter_.ndim)]
    return filter_ * np.asarray(factors, "float32").reshape(shape)


@pytest.mark.parametrize("bits", range(1, 8))
def test_a_filter_that_was_transposed_and_scaled_is_found_with_the_odd_integers_of_its_codes(bits):
    kernel = stored(bits)
    others = [stored(bits, seed=1), stored(3, (6, 20))]
    factors = [1.7, -0.3, 1e-3, 0.9, -40.0]
    for axes in itertools.permutations(range(4)):
        axis = axes.index(3)
        filter_ = scaled(kernel.levels.transpose(axes), axis, factors)
        moved = find_kernel(filter_, axis, [*others, kernel])
        found = exact_integers(filter_, axis, moved)
        odd = (2 * kernel.codes - (2**bits - 1)).transpose(axes)
        np.testing.assert_array_equal(found.integers, scaled(odd, axis, np.sign(factors)))
        assert (found.scale > 0).all()
        np.testing.assert_allclose(
            scaled(found.integers, axis, found.scale), filter_, rtol=3e-7, atol=0
        )


def test_without_a_factor_the_integers_times_their_scale_are_the_weights_bit_for_bit():
    for bits in range(1, 8):
        kernel = stored(bits)
        filter_ = kernel.levels.transpose(3, 0, 1, 2)
        found = exact_integers(filter_, 0, find_kernel(filter_, 0, [kernel]))
        decoded = found.scale[:, None, None, None] * found.integers.astype("float32")
        np.testing.assert_array_equal(decoded, filter_)


def test_a_depthwise_kernel_is_found_in_one_row_of_channels():
    kernel = stored(3, (3, 3, 4, 2))
    kernel = kernel._replace(step=np.ones((1, 1, 4, 2), "float32"), offset=kernel.offset[..., :1])
    filter_ = kernel.levels.reshape(1, 3, 3, 8)
    assert exact_integers(filter_, 3, find_kernel(filter_, 3, [kernel])).integers.shape == (
        1,
        3,
        3,
        8,
    )


def test_what_no_kernel_is_a_multiple_of_is_not_found():
    kernel = stored(4)
    filter_ = kernel.levels.copy()
    filter_[0, 0, 0, 0] *= 1.001
    assert find_kernel(filter_, 3, [kernel]) is None
    assert find_kernel(kernel.levels, 3, [stored(4, seed=1)]) is None
    assert find_kernel(kernel.levels, 3, []) is None


@pytest.mark.parametrize(("bits", "offset"), [(8, None), (4, -3.3)])
def test_grids_without_odd_integers_of_8_bits_are_rounded_to_the_nearest_of_255_levels(
    bits, offset
):
    kernel = stored(bits, offset=offset)
    moved = find_kernel(kernel.levels, 3, [kernel])
    assert exact_integers(kernel.levels, 3, moved) is None
    found = nearest_integers(kernel.levels, 3, moved)
    assert not found.exact
    assert abs(found.integers).max() == 127
    errors = np.abs(found.scale * found.integers - kernel.levels).max(axis=(0, 1, 2))
    assert (errors <= 0.5001 * found.scale).all()


def test_a_channel_of_zeros_has_integers_and_a_positive_scale():
    kernel = stored(3)
    filter_ = scaled(kernel.levels, 3, [1, 0, 1, 1, 1])
    moved = find_kernel(filter_, 3, [kernel])
    found = exact_integers(filter_, 3, moved)
    np.testing.assert_array_equal(found.scale[1] * found.integers[..., 1], 0)


def test_a_filter_of_zeros_has_integers_of_zero():
    """As folded with a batch normalization whose `gamma` begins at zero."""
    kernel = stored(8)
    found = nearest_integers(0 * kernel.levels, 3, kernel).stretched()
    assert not found.integers.any()
    assert np.isfinite(found.scale).all()
    found, bias, scale = found.with_integer_bias(np.ones(5, "float32"), np.float32(0.25), 3)
    np.testing.assert_array_equal(scale, found.scale * 0.25)
    np.testing.assert_allclose(bias * scale, 1, rtol=1e-6)


def test_a_bias_that_would_not_fit_is_kept_by_a_larger_scale_of_its_channel():
    kernel = stored(4)
    filter_ = scaled(kernel.levels, 3, [1e-12, 1, 1, 1, 1])
    found = exact_integers(filter_, 3, find_kernel(filter_, 3, [kernel])).stretched()
    wide, bias, scale = found.with_integer_bias(np.full(5, 0.7), np.float32(0.1), 3)
    assert (np.abs(bias * scale - 0.7) <= 0.501 * scale).all()
    np.testing.assert_allclose(bias[0] * scale[0], 0.7, rtol=1e-7)
    np.testing.assert_array_equal(wide.integers[..., 1:], found.integers[..., 1:])
    assert not wide.integers[..., 0].any()


@pytest.mark.parametrize("largest", [64, 127])
def test_integers_stretched_to_the_largest_are_the_same_filter(largest):
    for bits in range(1, 7):
        kernel = stored(bits)
        found = exact_integers(kernel.levels, 3, find_kernel(kernel.levels, 3, [kernel]))
        stretched = found.stretched(largest)
        assert largest / 2 < np.abs(stretched.integers).max() <= largest
        np.testing.assert_array_equal(
            stretched.scale * stretched.integers.astype("float32"), kernel.levels
        )
