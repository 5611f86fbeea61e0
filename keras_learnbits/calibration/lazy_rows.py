"""`LazyRows`: rows of a large array that are read and scaled when they are used."""

import numpy as np


class LazyRows:
    """Some rows of an array, times a number; only rows that are taken are read and computed.

    Args:
        array: NumPy array, which may be a file that is mapped into memory.
        scale: Number that values are multiplied by, in float32; or None.
        index: Array of the indices of the rows; all rows by default.

    Examples:
        >>> rows = LazyRows(np.array([[1], [2], [3]]), scale=0.5, index=np.array([0, 2]))
        >>> rows.shape, rows[1:].tolist()
        ((2, 1), [[1.5]])
    """

    def __init__(self, array, scale=None, index=None):
        self._array = array
        self._scale = scale
        self._index = np.arange(len(array)) if index is None else index
        self.shape = (len(self._index), *array.shape[1:])
        self.dtype = array.dtype if scale is None else np.dtype("float32")

    def __len__(self):
        return len(self._index)

    def __getitem__(self, index):
        found = self._array[self._index[index]]
        return found if self._scale is None else np.multiply(found, self._scale, dtype="float32")

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self[:], dtype)

    def rows(self, index):
        """`LazyRows` of some of these rows."""
        return LazyRows(self._array, self._scale, self._index[index])
