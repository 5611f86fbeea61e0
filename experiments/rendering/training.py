"""Tables of nets trained with learned bits: docs/results.md, docs/published.md."""

from rendering.formats import load, markdown, mean, mean_and_spread, points, runs_in, study

WAYS = {
    "learned": "learned bits",
    "uniform": "same bits in every layer",
    "float": "float",
    "ends": "8 bits in the first and last layer, {size} between",
    "hgq2": "HGQ2, one width per {per}, price {price}",
}


def pareto(folder):
    """Accuracy and size of each way to choose widths, a row for each size."""
    found = load(f"{folder}/pareto.json")
    reference = _runs(found, "float", None)
    rows = []
    for point in found["points"]:
        runs = _runs(found, point["kind"], point["size"])
        per, _, price = (point["size"] or "").partition(":")
        accuracies = [run["test_accuracy"] for run in runs]
        of_float = mean(run["test_accuracy"] for run in reference)
        rows.append(
            [
                WAYS[point["kind"]].format(size=point["size"], per=per, price=price),
                f"{mean(run['mean_bits'] or 32 for run in runs):.2f}",
                f"{mean(run['packed_bytes'] or run['float_bytes'] for run in runs):,.0f}",
                mean_and_spread(accuracies),
                "" if point["kind"] == "float" else points(mean(accuracies) - of_float),
                points(point["above_uniform"]),
                len(runs),
            ]
        )
    head = ["widths", "mean bits", "packed bytes", "test accuracy", "to float", "to uniform"]
    return markdown([*head, "seeds"], rows)


def _runs(found, kind, size):
    return [run for run in found["runs"] if (run["kind"], run["size"]) == (kind, size)]


def pareto_point(folder, kind, size):
    """One point of a study."""
    found = load(f"{folder}/pareto.json")["points"]
    return next(point for point in found if (point["kind"], point["size"]) == (kind, size))


PROGRAMS = {
    "digits": "digits",
    "mnist-bits2": "MNIST, LeNet, at most 2 bits",
    "mnist-bits1.25": "MNIST, LeNet, at most 1.25 bits",
    "mnist-logistic": "MNIST, logistic regression in float",
    "mnist-paper": "MNIST, LeNet32, published method",
}


def programs():
    """What each program ends at, with its command."""
    rows = []
    for name, title in PROGRAMS.items():
        runs = runs_in(name)
        accuracies = [run["test_accuracy"] for run in runs]
        of_float = [run["float_test_accuracy"] for run in runs]
        bits = [run["mean_bits"] or 32 for run in runs]
        packed = [run["packed_bytes"] for run in runs if run["packed_bytes"]]
        difference = "not trained"
        if None not in of_float:
            same = of_float == accuracies
            difference = "" if same else points(mean(accuracies) - mean(of_float))
        seeds = "" if len(runs) == 1 else f", and seeds 1 to {len(runs) - 1}"
        rows.append(
            [
                f"[{title}](../experiments/results/{name})",
                mean_and_spread(accuracies),
                difference,
                f"{mean(bits):.2f}",
                f"{mean(packed):,.0f}" if packed else "",
                f"{runs[0]['float_bytes']:,}",
                len(runs),
                runs[0]["epochs"],
                f"`{runs[0]['command']}`{seeds}",
            ]
        )
    head = ["net", "test accuracy", "to float", "mean bits", "packed bytes", "float32 bytes"]
    return markdown([*head, "seeds", "epochs", "command"], rows)


HGQ2_TRIALS = {
    "w1.5-b4-r03": ["1.5", "weight", "4 bits", "0.03"],
    "w1.5-b4-r003": ["1.5", "weight", "4 bits", "0.003"],
    "w1.5-b4-r01": ["1.5", "weight", "4 bits", "0.01"],
    "w1.5-b4-r1": ["1.5", "weight", "4 bits", "0.1"],
    "w1.5-b2-r01": ["1.5", "weight", "2 bits", "0.01"],
    "w2-b6-r03": ["2", "weight", "6 bits", "0.03"],
    "c0.3-b4-r03": ["0.3", "channel", "4 bits", "0.03"],
}


def hgq2_trials():
    """The settings of HGQ2 that were tried on held-out examples."""
    rows = []
    for name, settings in HGQ2_TRIALS.items():
        run = load(f"cifar10-quarter/hgq2-tuning/{name}.json")
        if run["evaluated_on"] != "held-out training examples":
            raise ValueError(f"{name} must be evaluated on held-out examples.")
        rows.append([*settings, f"{run['test_accuracy']:.1%}", f"{run['mean_bits']:.2f}"])
    head = ["price", "one width per", "start", "rate of the bits", "accuracy", "mean bits"]
    return markdown(head, rows)


def start():
    """Accuracy of the narrow net from a gradual descent and from a measured start."""
    studies = [
        load(f"cifar10-quarter/{name}.json")
        for name in ("pareto", "measured-start-free", "measured-start")
    ]
    rows = []
    for size in ("1.25", "1.5", "2", "3"):
        cells = []
        for found in studies:
            runs = _runs(found, "learned", size)
            seeds = "" if len(runs) == 3 else f" ({len(runs)} seed)"
            accuracy = f"{mean(run['test_accuracy'] for run in runs):.2%}" if runs else ""
            cells.append(f"{accuracy}{seeds}" if runs else "")
        rows.append([size, *cells])
    head = ["mean bits", "gradual", "measured start, any widths at the freeze",
            "measured start, within one bit"]  # fmt: skip
    return markdown(head, rows)


def published():
    """The published method's runs, with what was published."""

    def percent(error):
        return "" if error is None else f"{error:.2f}%"

    def listed(bits):
        return " ".join(map(str, bits))

    rows = [
        [
            run["name"],
            percent(run["error"]),
            "" if run["float_error"] == run["error"] else percent(run["float_error"]),
            percent(run["published_error"]),
            listed(run["bits"]),
            listed(run["published_bits"]),
            listed(f"{bits:.1f}" for bits in run["balanced_bits"]),
            "" if run["settled_at_step"] is None else f"{run['settled_at_step']:,}",
        ]
        for run in study("published")["runs"]
        if not run["name"].startswith("float, ")
    ]
    head = ["run", "error", "float, equally long", "published error", "bits", "published bits",
            "balance", "last change of bits at step"]  # fmt: skip
    return markdown(head, rows)
