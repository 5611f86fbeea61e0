"""Tables as text."""

import itertools


def aligned_table(blocks, left):
    """A table as text, with a horizontal rule below each block of rows.

    Args:
        blocks: List of blocks; a block is a list of rows, a row a sequence of strings.
        left: Number of columns that are aligned left; the other columns are aligned right.

    Examples:
        >>> print(aligned_table([[("layer", "bits")], [("dense", "2")]], left=1))
        layer  bits
        -----------
        dense     2
        -----------
    """
    widths = [max(map(len, column)) for column in zip(*itertools.chain(*blocks), strict=True)]

    def aligned(row):
        cells = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join(line for block in blocks for line in [*map(aligned, block), rule])
