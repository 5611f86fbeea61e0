"""Text in columns."""

import itertools


def aligned_table(blocks, left):
    """Text in columns, with a rule below each block of rows.

    Args:
        blocks: Lists of rows, which are sequences of as many strings.
        left: Number of columns that are flush left; the others are flush right.

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
