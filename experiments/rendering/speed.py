"""Tables of docs/speed.md."""

from rendering.formats import markdown, study


def overhead(policy):
    """Seconds of a training step relative to plain Keras."""
    found = study(f"overhead-{policy}")
    rows = []
    for net, each in found["nets"].items():
        kinds = dict(each["kinds"])
        plain = kinds.pop("plain Keras")
        row = [net, f"{1000 * plain['seconds_per_step']:.0f}"]
        row += [f"{kind['ratio']:.2f}" for kind in kinds.values()]
        row.append(f"{kinds['measured']['first_step_ratio']:.1f}")
        if "peak_bytes" in plain:
            peaks = (kinds["measured"]["peak_bytes"], plain["peak_bytes"])
            row.append("{:.0f} ({:.0f})".format(*(peak / 1e6 for peak in peaks)))
        rows.append(row)
    head = ["net", "plain Keras [ms]", *kinds, "first step"]
    head += ["memory [MB]"] if "peak_bytes" in plain else []
    return f"`{found['command']}`\n\n{markdown(head, rows)}"


def first_step(name):
    """Seconds to the end of the first step, with learned bits and in plain Keras."""
    found = study(name)
    rows = []
    for net, each in found["nets"].items():
        plain, learned = each["kinds"]["plain Keras"], each["kinds"]["measured"]
        seconds = [f"{kind['seconds_to_first_step']:.1f}" for kind in (plain, learned)]
        rows.append([net, *seconds, f"{learned['first_step_ratio']:.2f}"])
    head = ["net", "plain Keras [s]", "measured [s]", "ratio"]
    return f"`{found['command']}`\n\n{markdown(head, rows)}"


UNITS = {
    "step, one layer": "ms per weight",
    "step, deep net": "ms per layer",
    "first step": "s per layer",
    "peak memory": "MB per weight",
}


def growth():
    """How the additional cost grows with weights and layers."""
    found = study("scaling")
    rows = [[name, f"{found['slopes'][name]:.3g}", unit] for name, unit in UNITS.items()]
    head = ["additional cost", "slope", "unit"]
    return f"`{found['command']}`\n\n{markdown(head, rows)}"


def dense_ratios():
    """Seconds of learned bits over those of plain Keras, where a step does little else."""
    found = study("scaling")
    names = [("weights", size, f"one layer of {size} weights") for size in ("1e4", "1e6", "1e8")]
    names += [("layers", size, f"{size} layers") for size in ("5", "50", "500")]
    rows = []
    for kind, size, name in names:
        models = found[kind][size]
        plain, learned = models["plain Keras"], models["learned bits"]
        ratios = [learned[key] / plain[key] for key in ("step", "first_step")]
        rows.append([name, f"{ratios[0]:.2f}", f"{ratios[1]:.1f}"])
    return markdown(["model", "step", "first step"], rows)


def pipelines():
    """Seconds of an epoch, and the share of the model."""
    found = study("pipelines")
    rows = [
        [
            name,
            f"{each['epoch_seconds']:.1f}",
            f"{each['model_seconds'] / each['epoch_seconds']:.1%}",
            f"{each['data_seconds']:.2f}",
            f"{each['data_cpu_seconds']:.2f}",
        ]
        for name, each in found["programs"].items()
    ]
    head = ["program", "epoch [s]", "share of the model", "pipeline alone [s]", "its CPU [s]"]
    return f"`{found['command']}`\n\n{markdown(head, rows)}"
