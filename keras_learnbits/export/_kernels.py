"""Quantized kernels as integers, as the exporters write them."""

from typing import NamedTuple

import numpy as np


class KernelCodes(NamedTuple):
    """A quantized kernel, in three arrays of one shape.

    Attributes:
        name: Name of the kernel, as in the bit table.
        bits: Its bit-width.
        codes: Int32 array of integers in `0..2**bits - 1`.
        step: Float32 array, the distance of two levels.
        offset: Float32 array; a level is `step * (code + offset)`.
    """

    name: str
    bits: int
    codes: np.ndarray
    step: np.ndarray
    offset: np.ndarray

    @property
    def levels(self):
        """The quantized weights, float32: bit for bit those that the model uses."""
        return self.step * (self.codes.astype("float32") + self.offset)

    @property
    def is_mid_rise(self):
        """Whether 0 is half-way between two levels, as with `LearnedScaleQuantizer`."""
        return bool(np.all(self.offset == -0.5 * (2**self.bits - 1)))

    def moved(self, move):
        """The kernel after a function of arrays that only moves elements, as a transposition."""
        return self._replace(codes=move(self.codes), step=move(self.step), offset=move(self.offset))


def kernel_codes(kernel, name):
    """The `KernelCodes` of a `QuantizedKernel`."""
    codes, grid = kernel.encode()
    step, offset = (np.broadcast_to(part.numpy(), codes.shape) for part in grid[:2])
    return KernelCodes(name, int(kernel.integer_bits()), codes.numpy(), step, offset)


def shared(array):
    """An array cut to size 1 along the axes where it is constant.

    Examples:
        >>> shared(np.array([[1, 2], [1, 2]])).tolist()
        [[1, 2]]
    """
    for axis in range(array.ndim):
        first = array.take([0], axis)
        array = first if np.array_equal(np.broadcast_to(first, array.shape), array) else array
    return array


def narrowest(bits, widths):
    """The least width of an integer type that holds codes of so many bits.

    Examples:
        >>> narrowest(3, widths=(2, 4, 8, 16))
        4
    """
    return min(width for width in widths if width >= bits)
