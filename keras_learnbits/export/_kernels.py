"""Arrays and integer types of stored kernels, as the exporters write them."""

import numpy as np


def shared(array):
    """An array, cut to length 1 along each axis on which it is constant.

    Examples:
        >>> shared(np.array([[1, 2], [1, 2]])).tolist()
        [[1, 2]]
    """
    for axis in range(array.ndim):
        first = array.take([0], axis)
        array = first if np.array_equal(np.broadcast_to(first, array.shape), array) else array
    return array


def narrowest(bits, widths):
    """The smallest width of an integer type that can hold codes of `bits` bits.

    Examples:
        >>> narrowest(3, widths=(2, 4, 8, 16))
        4
    """
    return min(width for width in widths if width >= bits)
