"""`StoredKernel`: a quantized kernel in NumPy arrays, in the form in which files store it."""

import math
from typing import NamedTuple

import numpy as np


class StoredKernel(NamedTuple):
    """A quantized kernel, whose weights are `step * (code + offset)`.

    Attributes:
        name: Name of the kernel in tables and files.
        bits: Integer bit-width of the codes.
        codes: Int32 array of the kernel's shape, with integers in `0..2**bits - 1`.
        step: Float32 array with as many axes as the codes, which it broadcasts against; the
            distance between two levels.
        offset: Float32 array of the shape of `step`.

    Examples:
        >>> layer = keras_learnbits.LearnedBitDense(5, bits=3)
        >>> layer.build((None, 7))
        >>> stored = layer.quantized_kernels["kernel"].stored()
        >>> stored.codes.shape, stored.step.shape, stored.code_bytes  # 35 codes of 3 bits
        ((7, 5), (1, 5), 14)
    """

    name: str
    bits: int
    codes: np.ndarray
    step: np.ndarray
    offset: np.ndarray

    @property
    def levels(self):
        """The quantized weights, float32, equal to those of the model bit for bit."""
        return self.step * (self.codes.astype("float32") + self.offset)

    @property
    def max_code(self):
        """The highest code, `2**bits - 1`."""
        return 2**self.bits - 1

    @property
    def code_bytes(self):
        """Bytes of the packed codes, `ceil(weights * bits / 8)`."""
        return math.ceil(self.codes.size * self.bits / 8)

    @property
    def is_mid_rise(self):
        """Whether 0 lies half-way between two levels, so that the bit-width determines the offsets.

        This depends on the numbers and not on what the quantizer declares, because a file must
        decode to exactly these weights.
        """
        return bool(np.all(self.offset == -0.5 * self.max_code))

    def moved(self, move):
        """The kernel after a function of arrays that only moves elements, e.g. a transpose."""
        step, offset = (np.broadcast_to(each, self.codes.shape) for each in self[-2:])
        return self._replace(codes=move(self.codes), step=move(step), offset=move(offset))
