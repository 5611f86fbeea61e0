"""Tables of docs/gallery.md."""

from rendering.formats import markdown, mean, study

NETS = {
    "segmentation": "U-Net, segmentation",
    "keywords": "DS-CNN, keyword spotting",
    "autoencoder": "autoencoder",
    "transformer": "vision transformer",
}
OURS, OWN = 'arithmetic="int8"', "own dynamic range"


def _nets():
    """Title and results of each net."""
    tasks = study("gallery")["tasks"]
    return [(title, tasks[name]) for name, title in NETS.items()]


def gallery():
    """Each net of the gallery: its metric, its size and the duration of the call."""
    rows = []
    for title, entry in _nets():
        metric, score = next(iter(entry["float"]["scores"].items()))
        form = "{:.2%}" if metric == "accuracy" else "{:.4f}"
        scores, sizes, seconds = [], [], []
        for target in ("3", "2"):
            runs = entry["quantized"][target].values()
            scores.append(form.format(mean(run["scores"][metric] for run in runs)))
            sizes.append(f"{mean(run['packed_bytes'] for run in runs):,.0f}")
            seconds.append(mean(run["seconds"] for run in runs))
        size = f"{entry['float']['bytes']:,}"
        rows.append(
            [title, metric, form.format(score), *scores, size, *sizes, f"{max(seconds):.0f}"]
        )
    head = ["net", "metric", "float", "3 bits", "2 bits", "bytes, float", "3 bits", "2 bits",
            "seconds"]  # fmt: skip
    return f"`python experiments/gallery.py`\n\n{markdown(head, rows)}"


def conversion():
    """How many kernels of which layers are quantized, and which layers stay float."""
    rows = []
    for title, entry in _nets():
        report = entry["conversion"]
        quantized, left = {}, {}
        for _, kind, _, what in report["rows"]:
            counts = left if what.startswith("left") else quantized
            counts[kind] = counts.get(kind, 0) + 1
        parts = (
            ", ".join(f"{number} {kind}" for kind, number in counts.items())
            for counts in (quantized, left)
        )
        share = report["learned_weights"] / (report["learned_weights"] + report["float_weights"])
        rows.append([title, *parts, f"{report['learned_weights']:,}", f"{share:.1%}"])
    head = ["net", "layers with quantized kernels", "layers that stay float", "quantized weights",
            "of all"]  # fmt: skip
    return markdown(head, rows)


def latency():
    """LiteRT files of the widths at 3 mean bits: latency and bytes compared with float."""
    rows = []
    for title, entry in _nets():
        found = entry["latency"]
        size = found["bytes"]
        rows.append(
            [
                title,
                f"{found['milliseconds']['float']:.3f}",
                *(f"{found['ratio'][file]:.2f}" for file in (OURS, OWN)),
                f"{size['float']:,}",
                *(f"{size[file] / size['float']:.0%}" for file in (OURS, OWN)),
            ]
        )
    head = ["net", "float [ms]", "int8, of float", "LiteRT's own, of float", "bytes, float",
            "int8, of float", "LiteRT's own, of float"]  # fmt: skip
    notes = {entry["latency"]["note"] for _, entry in _nets()} - {None}
    note = f" During the measurement the machine had {' or '.join(sorted(notes))}." if notes else ""
    return f"`python experiments/gallery.py --latency_only`.{note}\n\n{markdown(head, rows)}"
