"""Curves of the bits during training: a picture, and the number of their reversals."""

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def direction_changes(logger, freeze_step):
    """Reversals of each layer's bits in the last quarter of the training before the freeze.

    None if an interrupted training was resumed in this last quarter, so that not all was recorded.
    """
    if logger.steps[0] > 0.75 * freeze_step:
        return None
    steps = np.array(logger.steps)[1:]
    counted = (steps > 0.75 * freeze_step) & (steps <= freeze_step)
    turns = {}
    for name, moves in zip(logger.names, np.diff(logger.bits, axis=0).T, strict=True):
        moved = np.flatnonzero(moves * (steps <= freeze_step))
        signs = np.sign(moves[moved])
        turns[name] = int(np.sum((signs[1:] != signs[:-1]) & counted[moved[1:]]))
    return turns


# With different dashes, curves that coincide remain visible.
STYLES = ("-", "--", "-.", ":")


def plot_bits(logger, path, title, freeze_step):
    """Bits of each layer over training steps; the legend has the integers at the end."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    curves = np.transpose(logger.bits)
    for number, (name, bits) in enumerate(zip(logger.names, curves, strict=True)):
        style, width = STYLES[number % len(STYLES)], 2.4 - 0.4 * (number % len(STYLES))
        label = f"{name}: {int(bits[-1] + 0.5)}"
        axes.plot(logger.steps, bits, style, linewidth=width, label=label)
    if freeze_step < logger.steps[-1]:
        axes.axvline(freeze_step, color="gray", linewidth=0.8)
        axes.annotate("bits are frozen", (freeze_step, 1), (4, -12), color="gray",
                      xycoords=("data", "axes fraction"), textcoords="offset points")  # fmt: skip
    axes.set(xlabel="training step", ylabel="bit-width [bits]", title=f"{title}: learned bits")
    axes.set_ylim(0.5, max(8.5, np.max(logger.bits) + 0.5))
    axes.grid(alpha=0.3)
    title = "layer: bits at the end"
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, title=title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def save_bits(logger, path):
    """Bits of each layer over training steps as CSV, one column per layer."""
    names = ",".join(["step", *(name.replace(",", " ") for name in logger.names)])
    table = np.column_stack([logger.steps, np.reshape(logger.bits, (len(logger.steps), -1))])
    np.savetxt(path, table, "%.6g", delimiter=",", header=names, comments="")
