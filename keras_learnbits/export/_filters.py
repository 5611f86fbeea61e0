"""Finds the kernel that a constant of a converted graph comes from, and its integers.

Converters fold a batch normalization into the filter before it, and transpose and reshape filters.
Each output channel of a filter is then a multiple of the same channel of a kernel, whose elements
were moved. All kernels and all orders of their axes are searched for one that matches. A filter
without a match is not changed, so the result is right whatever a converter does.
"""

import itertools
from typing import NamedTuple

import numpy as np

from keras_learnbits.layers.stored_kernel import StoredKernel

# The product of a channel and its factor is rounded once, to 2**-24 of itself.
TOLERANCE = 2.0**-22
# Largest magnitude of the int8 weights that runtimes take.
LARGEST = 127
# The width up to which kernels are rounded to 8 bits for integer arithmetic.
ROUNDED_BITS = 8
# The integers of a bias leave most of an int32 to the sum of products.
LARGEST_BIAS = 2**26


class IntegerFilter(NamedTuple):
    """A filter in integers: `scale * integers`, with one scale for each output channel.

    Attributes:
        kernel: `StoredKernel` that it comes from.
        integers: Int32 array of the filter's shape, within -127 and 127.
        scale: Float32 array, one positive number for each index of the channels' axis.
        exact: Whether the integers are the codes of the kernel; otherwise they are rounded.
    """

    kernel: StoredKernel
    integers: np.ndarray
    scale: np.ndarray
    exact: bool

    @property
    def note(self):
        """What an export's report says about these integers."""
        return "" if self.exact else f"rounded to {2 * abs(self.integers).max() + 1} levels"

    def stretched(self, largest=LARGEST):
        """The same filter in integers multiplied by a power of two, its scale divided by that.

        A bias is an int32 at the product of the scales of input and filter, which would be too
        coarse for a kernel of few bits.

        Args:
            largest: Magnitude that the integers keep to.
        """
        factor = 2 ** int(np.log2(largest // max(abs(self.integers).max(), 1)))
        return self._replace(integers=factor * self.integers, scale=self.scale / np.float32(factor))

    def with_integer_bias(self, bias, step, axis):
        """The filter and a bias in the integers to which products of inputs and filter are added.

        A channel that is zero, or so small that the integers of its bias would be too large, as
        after a batch normalization whose `gamma` is zero, gets the scale that its bias needs.

        Args:
            bias: Float32 array, one number for each output channel.
            step: Float32 number, the scale of the inputs.
            axis: Axis of the output channels.

        Returns:
            `IntegerFilter`, int32 array, and the float32 scales of the bias: those of the filter
            times `step`.
        """
        rows = _by_channel(self.integers, axis)
        needed = (np.abs(bias) / (LARGEST_BIAS * step)).astype("float32")
        is_free = ~rows.any(axis=1) & (needed > 0)
        scale = np.where(is_free, needed, np.maximum(self.scale, needed))
        rows = np.rint(rows * (self.scale / scale)[:, None]).astype("int32")
        found = self._replace(integers=_from_channels(rows, self.integers.shape, axis), scale=scale)
        bias_scale = (scale * step).astype("float32")
        return found, np.rint(bias / bias_scale).astype("int32"), bias_scale


def find_kernel(filter_, axis, kernels):
    """Finds the kernel that a filter comes from.

    Args:
        filter_: Float32 array.
        axis: Axis of its output channels.
        kernels: List of `StoredKernel`.

    Returns:
        `StoredKernel` whose elements are in the filter's order, or None.
    """
    channels = _by_channel(filter_, axis)
    for kernel in kernels:
        if kernel.codes.size != filter_.size:
            continue
        for axes in itertools.permutations(range(kernel.codes.ndim)):

            def move(array, axes=axes):
                return array.transpose(axes).reshape(filter_.shape)

            moved = kernel.moved(move)
            levels = _by_channel(moved.levels, axis)
            if all(_is_multiple(channels[part], levels[part]) for part in (slice(1), slice(None))):
                return moved
    return None


def exact_integers(filter_, axis, kernel):
    """A filter in the integers of its kernel's codes; None if there are none of 8 bits.

    A mid-rise level is `step * (code - (2**bits - 1) / 2)`, which is half a step times an odd
    integer, `2 * code - (2**bits - 1)`. Halving a float32 is exact, so without a batch
    normalization the product is the weight bit for bit. Grids are closed under negation, so that
    channels with a negative factor have integers, too.

    Args:
        filter_: Float32 array.
        axis: Axis of its output channels.
        kernel: `StoredKernel` that the filter comes from, the result of `find_kernel`.

    Returns:
        `IntegerFilter` or None.

    Examples:
        >>> codes = np.array([[0, 1], [3, 2]])
        >>> kernel = StoredKernel("dense", 2, codes, np.full((1, 1), 0.5), np.full((1, 1), -1.5))
        >>> exact_integers(kernel.levels, 1, kernel).integers.tolist()
        [[-3, -1], [3, 1]]
    """
    if not kernel.is_mid_rise or kernel.max_code > LARGEST:
        return None
    odd = _by_channel(2 * kernel.codes - kernel.max_code, axis)
    channels = _by_channel(filter_, axis)
    step = _by_channel(np.broadcast_to(kernel.step, filter_.shape), axis)
    scale = np.float32(0.5) * step[:, 0]
    if not np.array_equal(scale[:, None] * odd.astype("float32"), channels):
        scale = _factors(channels, odd.astype("float32"))
        product = scale[:, None] * odd
        if not _is_close(channels, product):
            return None
    integers = _from_channels(np.sign(scale)[:, None].astype("int32") * odd, filter_.shape, axis)
    scale = np.where(scale == 0, 1.0, np.abs(scale)).astype("float32")  # channels of zeros
    return IntegerFilter(kernel, integers, scale, exact=True)


def nearest_integers(filter_, axis, kernel, largest=LARGEST):
    """A filter in the nearest of evenly spaced levels of each channel, as runtimes round weights.

    Args:
        filter_: Float32 array.
        axis: Axis of its output channels.
        kernel: `StoredKernel` that the filter comes from, the result of `find_kernel`.
        largest: Largest magnitude of the integers: half of the levels.

    Returns:
        `IntegerFilter`.
    """
    channels = _by_channel(filter_, axis)
    scale = np.abs(channels).max(axis=1) / np.float32(largest)
    scale = np.where(scale > 0, scale, 1.0).astype("float32")
    integers = np.rint(channels / scale[:, None]).astype("int32")
    return IntegerFilter(kernel, _from_channels(integers, filter_.shape, axis), scale, exact=False)


def eight_bit_integers(kernels, filter_, axis, largest=LARGEST):
    """The integers of a filter for integer arithmetic: exact ones if they exist, or the nearest.

    Args:
        kernels: List of `StoredKernel`.
        filter_: Float32 array.
        axis: Axis of its output channels.
        largest: Largest magnitude of the integers.

    Returns:
        `IntegerFilter`; None if it comes from no kernel of at most 8 bits.
    """
    kernel = find_kernel(filter_, axis, kernels)
    if kernel is None or kernel.bits > ROUNDED_BITS:
        return None
    exact = exact_integers(filter_, axis, kernel)
    if exact is not None and abs(exact.integers).max() <= largest:
        return exact
    return nearest_integers(filter_, axis, kernel, largest)


def _by_channel(array, axis):
    """An array with one row for each output channel."""
    return np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)


def _from_channels(rows, shape, axis):
    """An array of a shape from one row for each output channel."""
    moved = [shape[axis], *np.delete(shape, axis)]
    return np.moveaxis(rows.reshape(moved), 0, axis)


def _is_multiple(rows, others):
    """Whether each row is a multiple of the other's."""
    return _is_close(rows, _factors(rows, others)[:, None] * others)


def _factors(rows, others):
    """The factor between two arrays in each row, taken where the other is largest, float32."""
    largest = np.abs(others).argmax(axis=1)[:, None]
    at_largest = np.take_along_axis(others, largest, 1)[:, 0]
    of_rows = np.take_along_axis(rows, largest, 1)[:, 0]
    safe = np.where(at_largest == 0, 1.0, at_largest)
    return (of_rows / safe).astype("float32")


def _is_close(rows, others):
    tolerance = TOLERANCE * np.abs(rows).max(axis=1, keepdims=True)
    return bool(np.all(np.abs(rows - others) <= tolerance))
