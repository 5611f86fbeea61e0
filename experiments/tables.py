"""Renders the tables of docs/exports.md from their result files, between its markers.

python experiments/tables.py
python experiments/tables.py --check
"""

import json
import pathlib
import re

from absl import app, flags

FLAGS = flags.FLAGS
flags.DEFINE_bool("check", False, "Fail if a table is not that of its file; write nothing.")

ROOT = pathlib.Path(__file__).parent.parent
STUDIES = ROOT / "experiments" / "results" / "studies"
PAGE = ROOT / "docs" / "exports.md"


def markdown(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def sizes(program):
    study = json.loads((STUDIES / f"exports-{program}.json").read_text())
    rows = []
    for name, size in study["bytes"].items():
        predicted = name in study["largest_difference"]
        rows.append(
            [
                name,
                f"{size:,}",
                f"{size / study['bytes']['float .keras']:.1%}",
                f"{study['test_accuracy'][name]:.2%}" if predicted else "",
                f"{study['largest_difference'][name]:.1e}" if predicted else "",
            ]
        )
    head = ["file", "bytes", "of float", "test accuracy", "largest difference"]
    return (
        f"`{study['command']}`: the model has {study['test_accuracy']['model']:.2%} at "
        f"{study['mean_bits']:.2f} mean bits, and outputs up to {study['largest_output']:.1f}.\n\n"
        + markdown(head, rows)
    )


def latencies():
    study = json.loads((STUDIES / "latency.json").read_text())
    floats = {
        (row["net"], row["runtime"]): row["bytes"]
        for row in study["rows"]
        if row["file"] == "float"
    }
    rows = [
        [
            row["net"],
            row["runtime"],
            row["file"],
            f"{row['bytes']:,}",
            f"{row['bytes'] / floats[row['net'], row['runtime']]:.0%}",
            *(f"{row['milliseconds'][size]:.2f}" for size in ("1", "32")),
            *(f"{row['ratio'][size]:.2f}" for size in ("1", "32")),
            "" if row["difference"] is None else f"{row['difference']:.0e}",
        ]
        for row in study["rows"]
    ]
    head = ["net", "runtime", "file", "bytes", "of float", "batch 1 [ms]", "batch 32 [ms]",
            "of float, batch 1", "of float, batch 32", "difference"]  # fmt: skip
    return f"`{study['command']}`\n\n{markdown(head, rows)}"


def spread(runtime, file, nets=None):
    """The lowest and the highest ratio to the float file, over nets and batches."""
    study = json.loads((STUDIES / "latency.json").read_text())
    ratios = [
        ratio
        for row in study["rows"]
        if (row["runtime"], row["file"]) == (runtime, file) and (not nets or row["net"] in nets)
        for ratio in row["ratio"].values()
    ]
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def decisions():
    activations = 'arithmetic="int8", activations=True'
    rows = [
        ["LiteRT, on a phone or a server", '`export_litert(model, path, arithmetic="int8")`',
         "1; 0.5 for dense layers of up to 3 bits", spread("LiteRT", 'arithmetic="int8"')],
        ["LiteRT, with the model's exact predictions", "`export_litert(model, path)`", "1",
         spread("LiteRT", 'arithmetic="float"')],
        ["LiteRT, in integers throughout", "`to_learned_bits(..., activations=True)`, train, "
         '`export_litert(model, path, arithmetic="int8")`', "1", spread("LiteRT", activations)],
        ["onnxruntime", "`export_onnx(model, path)`", "0.25, 0.5 or 1",
         spread("onnxruntime", 'arithmetic="float"')],
        ["onnxruntime, in integers", "`to_learned_bits(..., activations=True)`, train, "
         '`export_onnx(model, path, arithmetic="int8")`', "1; 4 where it stays float",
         spread("onnxruntime", activations)],
        ["OpenVINO", "`export_onnx(model, path, opset=21)`", "0.5 or 1",
         spread("OpenVINO", 'arithmetic="float"')],
        ["OpenVINO, in integers", "as for onnxruntime", "1; 4 where it stays float",
         spread("OpenVINO", activations)],
        ["hardware compilers", "`export_qonnx(model, path)`", "4; the graph has the widths", ""],
        ["Keras, or an archive", "`save_packed(model, path)`", "bits / 8", ""],
    ]  # fmt: skip
    return markdown(["it runs in", "call", "bytes per weight", "latency, of float"], rows)


BLOCKS = {
    "decisions": decisions,
    "sizes mnist": lambda: sizes("mnist"),
    "sizes cifar10": lambda: sizes("cifar10"),
    "latencies": latencies,
}


def main(argv):
    del argv
    text = PAGE.read_text()
    new = text
    for name, render in BLOCKS.items():
        pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
        if not re.search(pattern, new, re.S):
            raise SystemExit(f"{PAGE.name} must have markers for {name!r}.")
        new = re.sub(pattern, lambda m, r=render: f"{m[1]}\n{r()}\n\n{m[2]}", new, flags=re.S)
    if FLAGS.check and new != text:
        raise SystemExit("Tables differ from their files: run `python experiments/tables.py`.")
    if not FLAGS.check:
        PAGE.write_text(new)


if __name__ == "__main__":
    app.run(main)
