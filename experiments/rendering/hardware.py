"""The table of docs/hardware.md."""

from rendering.formats import markdown, study

HARDWARE_NETS = {
    "digits": "digits, CNN",
    "jets": "drawn points, dense",
    "mnist": "MNIST, CNN",
}


WAYS = {
    "float": "float",
    "learned": "learned bits",
    "uniform": "equal bits",
    "post": "quantized without labels",
    "post_trained": "quantized, then trained",
    "hgq2": "HGQ2",
}


def hardware():
    """Accuracy against bit operations, and what the C++ takes."""
    points = study("hardware")["points"]
    rows = []
    for net, title in HARDWARE_NETS.items():
        for way, name in WAYS.items():
            chosen = [each for each in points if (each["net"], each["way"]) == (net, way)]
            for each in sorted(chosen, key=lambda point: point["bit_operations"] or 0):
                several = f" ± {100 * each['spread']:.2f}" if each["seeds"] > 1 else ""
                rows.append(
                    [
                        title,
                        name,
                        _or_nothing(each["bit_operations"], "{:,.0f}"),
                        f"{each['accuracy']:.2%}{several}",
                        "" if way == "float" else f"{-100 * each['gap']:+.2f}",
                        _or_nothing(each["largest_difference"], "{:g}"),
                        _or_nothing(each["export_seconds"], "{:.0f}"),
                        str(each["seeds"]),
                    ]
                )
    head = ["net", "widths", "bit operations", "accuracy", "to float", "largest difference",
            "export and compile [s]", "seeds"]  # fmt: skip
    return f"`python experiments/hardware.py`\n\n{markdown(head, rows)}"


def _or_nothing(value, form):
    return "" if value is None else form.format(value)
