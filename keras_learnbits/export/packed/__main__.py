"""Prints the contents of a packed file: `python -m keras_learnbits.export.packed FILE`."""

import argparse
import math
import os
import sys

from keras_learnbits.export.packed import reader
from keras_learnbits.tables import aligned_table

# The line that explains the columns of the table.
LEGEND = (
    "codes [B]: bytes of integers; scales [B]: bytes of steps, and of offsets if grid is affine"
)


def bit_table_of(path):
    """The bit table of a packed file, as text.

    Args:
        path: Path of the file.

    Raises:
        reader.PackedFileError: The file is not a packed file, or is damaged.
        OSError: The file cannot be opened.

    Examples:
        >>> import os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
        >>> layer = keras_learnbits.LearnedBitDense(8, bits=3, name="dense")
        >>> keras_learnbits.export.packed.save_packed(
        ...     keras.Model(x := keras.Input((64,)), layer(x)), path)
        >>> print(bit_table_of(path).splitlines()[2])
        dense/kernel  64x8       512     3  mid_rise        192          32
    """
    weights = reader.read_packed(path).weights
    kernels = [weight for weight in weights if isinstance(weight, reader.PackedKernel)]
    others = [weight for weight in weights if isinstance(weight, reader.PackedArray)]
    head = ("kernel", "shape", "weights", "bits", "grid", "codes [B]", "scales [B]")
    rows = [
        (
            kernel.name,
            "x".join(map(str, kernel.shape)),
            f"{kernel.size:,}",
            str(kernel.bits),
            kernel.grid,
            f"{kernel.data['codes'].nbytes:,}",
            f"{kernel.data['scales'].nbytes:,}",
        )
        for kernel in kernels
    ]
    quantized = sum(kernel.size for kernel in kernels)
    mean_bits = sum(kernel.size * kernel.bits for kernel in kernels) / max(quantized, 1)
    totals = [
        (
            "quantized",
            "",
            f"{quantized:,}",
            f"{mean_bits:.2f}",
            "",
            *(f"{sum(kernel.data[each].nbytes for kernel in kernels):,}"
              for each in ("codes", "scales")),
        )
    ]  # fmt: skip
    for dtype in sorted({weight.dtype for weight in others}):
        elements = [weight.data[dtype] for weight in others if weight.dtype == dtype]
        size, width = sum(each.size for each in elements), elements[0].itemsize
        totals.append((dtype, "", f"{size:,}", str(8 * width), "", f"{size * width:,}", "0"))
    parameters = sum(math.prod(weight.shape) for weight in weights)
    return "\n".join(
        [
            aligned_table([[head], rows, totals], left=2),
            LEGEND,
            f"{os.path.getsize(path):,} bytes in the file, {4 * parameters:,} in float32",
        ]
    )


def main(arguments=None):
    """Prints the table of a file, or exits with an error message.

    Args:
        arguments: List of strings; by default those of the command line.
    """
    parser = argparse.ArgumentParser(
        prog="python -m keras_learnbits.export.packed", description="Prints a packed file's bits."
    )
    parser.add_argument("file", help="a file that `keras_learnbits.save_packed` wrote")
    try:
        print(bit_table_of(parser.parse_args(arguments).file))
    except (OSError, reader.PackedFileError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
