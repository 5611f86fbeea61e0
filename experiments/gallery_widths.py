"""The picture of the gallery: the bit-width of each layer of its nets.

python experiments/gallery_widths.py

Draws docs/images/gallery.png from results/studies/gallery.json.
"""

import json
import pathlib
import re

import matplotlib.pyplot as plt
import numpy as np
from rendering.gallery import NETS

ROOT = pathlib.Path(__file__).parent.parent
COLORS = {"3": "#2f6fb3", "2": "#d08c3c"}


def readable(layers):
    """Names without the numbers that Keras counts over all nets; repeated names are numbered."""
    stems = [re.sub(r"_\d+$", "", name.removesuffix("/kernel")) for name in layers]
    seen = {}
    for stem in stems:
        seen.setdefault(stem, []).append(stem)
    counters = dict.fromkeys(seen, 0)
    names = []
    for stem in stems:
        counters[stem] += 1
        names.append(f"{stem} {counters[stem]}" if len(seen[stem]) > 1 else stem)
    return names


def main():
    study = json.loads((ROOT / "experiments/results/studies/gallery.json").read_text())["tasks"]
    tasks = [name for name in NETS if name in study]
    heights = [len(study[name]["layers"]) + 3 for name in tasks]
    figure, axes = plt.subplots(
        len(tasks),
        1,
        figsize=(5.2, 0.2 * sum(heights)),
        height_ratios=heights,
        layout="constrained",
    )
    for axis, name in zip(axes, tasks, strict=True):
        entry = study[name]
        places = np.arange(len(entry["layers"]))
        for number, (target, color) in enumerate(COLORS.items()):
            bits = entry["quantized"][target]["0"]["bits"]
            axis.barh(places + 0.4 * number, bits, 0.4, color=color, label=f"mean {target} bits")
        for place, weights in zip(places, entry["weights"], strict=True):
            axis.text(8.2, place + 0.2, f"{weights:,}", va="center", fontsize=8, color="#555")
        labels = readable(entry["layers"])
        axis.set_yticks(places + 0.2, labels, fontsize=9)
        axis.set_ylim(len(places) - 0.2, -0.5)
        axis.set_xlim(0, 9.6)
        axis.set_xticks(range(0, 9, 2))
        axis.set_title(NETS[name], fontsize=11, loc="left")
        axis.text(8.2, -0.6, "weights", fontsize=8, color="#555", va="bottom")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper right", ncols=2, fontsize=9, frameon=False)
    axes[-1].set_xlabel("bits per weight")
    figure.savefig(ROOT / "docs" / "images" / "gallery.png", dpi=150)


if __name__ == "__main__":
    main()
