"""The picture on the front page: size, accuracy and latency of one net, float and quantized.

python experiments/front.py

Draws docs/images/front.png from results/studies/post-training.json and latency.json. All bars of a
row are of one file: the `.tflite` file that runs, its size that of a compressed download.
"""

import json
import pathlib

import matplotlib.pyplot as plt

ROOT = pathlib.Path(__file__).parent.parent
STUDIES = ROOT / "experiments" / "results" / "studies"
BASE, OTHER, OURS = "#8a8f98", "#d08c3c", "#2f6fb3"


def ratios():
    """Latency of the net's files in LiteRT compared with float."""
    rows = json.loads((STUDIES / "latency.json").read_text())["rows"]
    of_net = ("ResNet-20", "LiteRT")
    return {
        row["file"]: row["ratio"]["1"] for row in rows if (row["net"], row["runtime"]) == of_net
    }


def rows():
    """Name, color, bytes, accuracy and latency compared with float, for each bar from above."""
    results = json.loads((STUDIES / "post-training.json").read_text())
    ours, key = ratios()['arithmetic="int8"'], "resnet20-quantize-{}-0-1024-test"
    found = [
        ("float", BASE, "resnet20-float-test", 1.0),
        ("LiteRT's 8 bits", OTHER, "resnet20-litert-8-0-1024-test", ratios()["own full integer"]),
        *((f"ours, {bits} bits", OURS, key.format(bits), ours) for bits in (4, 3, 2)),
    ]
    return [
        (
            name,
            color,
            results[key]["litert"]["gzip_bytes"],
            results[key]["litert"]["accuracy"],
            ratio,
        )
        for name, color, key, ratio in found
    ]


def main():
    found = rows()[::-1]
    names, colors, sizes, accuracies, latencies = zip(*found, strict=True)
    # Small, so that the text stays readable at the width of a phone.
    figure, axes = plt.subplots(1, 3, figsize=(6.4, 2.1), sharey=True, layout="constrained")
    panels = [
        ("download [kB]", [size / 1000 for size in sizes], "{:,.0f}"),
        ("test accuracy [%]", [100 * each for each in accuracies], "{:.1f}"),
        ("latency / float", latencies, "{:.2f}"),
    ]
    for axis, (title, values, form) in zip(axes, panels, strict=True):
        bars = axis.barh(names, values, color=colors)
        axis.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=10.5)
        axis.set_title(title, fontsize=10.5)
        axis.set_xlim(0, 1.45 * max(values))
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.tick_params(axis="x", bottom=False, labelbottom=False)
        axis.tick_params(axis="y", length=0, labelsize=10.5)
    figure.savefig(ROOT / "docs" / "images" / "front.png", dpi=200)


if __name__ == "__main__":
    main()
