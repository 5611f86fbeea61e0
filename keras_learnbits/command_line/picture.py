"""`bits.png`: the bit-width of each layer as a picture."""

import io

from keras_learnbits.export._files import write_atomically
from keras_learnbits.inspection.bit_table import bit_table

INCHES_PER_LAYER = 0.28


def draw_bits(model, path):
    """Draws the bit-width of each layer as a bar.

    Args:
        model: Model with learned-bit layers.
        path: Path of the PNG file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"bits.png needs matplotlib: `pip install matplotlib`. Received: {error}"
        ) from error
    table = bit_table(model)
    rows = table.rows
    # Without pyplot, which would choose a window system.
    figure = Figure((7, 1.2 + INCHES_PER_LAYER * len(rows)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(range(len(rows)), [row.bits for row in rows], color="#3b6fd4")
    axes.bar_label(bars, [f"{row.bits}" for row in rows], padding=3)
    labels = [f"{row.layer} ({row.weights / table.weights:.1%})" for row in rows]
    axes.set_yticks(range(len(rows)), [label.replace("$", r"\$") for label in labels])
    axes.invert_yaxis()
    axes.set_xlim(0, max(8, *(row.bits for row in rows)) + 0.5)
    axes.set_xlabel("bits per weight (in parentheses: share of the weights)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.axvline(table.mean_bits, color="#888", linestyle=":")
    axes.set_title(f"{table.mean_bits:.2f} mean bits, {table.compression:.1f} times smaller")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    write_atomically(path, content.getvalue())
