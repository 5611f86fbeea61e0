"""Table of the transformer on words."""

import re

from rendering.formats import markdown, mean, points, study

METHODS = {
    "float": "float",
    "continued": "float, trained further",
    "nearest": "the same width in every layer, rounded to nearest",
    "quantize": "`klb.quantize`",
    "uniform": "the same width in every layer, trained",
    "learned": "bits learned in training",
    "trained_uniform": "`klb.quantize` to the same width in every layer, then trained",
    "trained": "`klb.quantize`, then trained",
}


def sequences():
    """Accuracy and size by each method, means over seeds."""
    runs = study("text")["runs"]
    rows = []
    for method, name in METHODS.items():
        for bits in ("32", "4", "3", "2"):
            found = {
                key.split("-")[3]: each
                for key, each in runs.items()
                if re.fullmatch(rf"transformer-{method}-{bits}-\d+", key)
                and "test_accuracy" in each
            }
            if found:
                rows.append(_row(name, method, bits, found, runs))
    head = ["method", "bits", "accuracy", "to float", "bytes", "seconds", "seeds"]
    return f"`python experiments/text.py --seeds=0,1`\n\n{markdown(head, rows)}"


def _row(name, method, bits, found, runs):
    gaps = [
        each["test_accuracy"] - runs[f"transformer-float-32-{seed}"]["test_accuracy"]
        for seed, each in found.items()
    ]
    several = f" ({points(min(gaps))} to {points(max(gaps))})" if len(gaps) > 1 else ""
    return [
        name,
        bits,
        f"{mean(each['test_accuracy'] for each in found.values()):.2%}",
        "" if method == "float" else f"{points(mean(gaps))}{several}",
        f"{mean(each['bytes'] for each in found.values()):,.0f}",
        f"{mean(each['seconds'] for each in found.values()):.0f}",
        len(found),
    ]
