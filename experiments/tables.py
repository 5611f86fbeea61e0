"""Renders tables of the documentation from their result files, between markers in its pages.

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
RESULTS = ROOT / "experiments" / "results"
STUDIES = RESULTS / "studies"


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
        ["TFLite Micro", "LiteRT's own full-integer conversion of `to_keras(model)`", "1", ""],
        ["FPGAs, through hls4ml", "`quantize(..., activations=True, power_of_two=True)`, "
         "`export_hls4ml(model, directory)`", "bits / 8", ""],
        ["other compilers", "`export_qonnx(model, path)`", "4; the graph has the widths", ""],
        ["Keras, or an archive", "`save_packed(model, path)`", "bits / 8", ""],
    ]  # fmt: skip
    return markdown(["it runs in", "call", "bytes per weight", "latency, of float"], rows)


METHODS = {
    "quantize": "`klb.quantize`",
    "steps=0": "`klb.quantize(steps=0)`",
    "nearest": "the same width in every layer, rounded to nearest",
    "litert": "LiteRT's own, 8 bits",
    "onnxruntime": "onnxruntime's own, 8 bits",
}
NETS = {
    "lenet": "MNIST, LeNet",
    "cnn_quarter": "CIFAR-10, 0.13 M weights",
    "depthwise": "CIFAR-10, depthwise, 0.21 M",
    "resnet20": "CIFAR-10, ResNet-20, 0.27 M",
    "cnn": "CIFAR-10, 1.1 M weights",
}


def post_training():
    """Accuracy and size of each net by each method, from 1,024 images."""
    results = json.loads((STUDIES / "post-training.json").read_text())
    rows = []
    for net, title in NETS.items():
        base = results.get(f"{net}-float-test")
        if base is None:
            continue
        rows.append([title, "float", "32", f"{base['accuracy']:.2%}", "", f"{base['bytes']:,}", ""])
        for method, name in METHODS.items():
            for bits in ("8", "4", "3", "2"):
                runs = _runs(results, net, method, bits)
                if runs:
                    rows.append(_post_training_row(title, name, bits, runs, base))
    head = ["net", "method", "bits", "accuracy", "to float", "bytes", "seconds"]
    command = f"python experiments/post_training.py --methods={','.join(METHODS)}"
    return f"`{command}`\n\n{markdown(head, rows)}"


def post_training_in_short():
    """Change of accuracy of each net at 4, 3 and 2 bits, a mean over samples."""
    results = json.loads((STUDIES / "post-training.json").read_text())
    rows = []
    for net, title in NETS.items():
        base = results.get(f"{net}-float-test")
        if base is None:
            continue
        cells = []
        for bits in ("4", "3", "2"):
            runs = _runs(results, net, "quantize", bits)
            gaps = [100 * (each["accuracy"] - base["accuracy"]) for each in runs]
            cells.append(f"{sum(gaps) / len(gaps):+.2f}" if gaps else "")
        size = _runs(results, net, "quantize", "2")[0]["bytes"]
        rows.append([title, f"{base['accuracy']:.2%}", *cells, f"{base['bytes']:,}", f"{size:,}"])
    head = ["net", "float", "4 bits", "3 bits", "2 bits", "bytes, float", "bytes, 2 bits"]
    return markdown(head, rows)


def _runs(results, net, method, bits):
    """Results of all samples of 1,024 images."""
    pattern = rf"{net}-{re.escape(method)}-{bits}-\d+-1024-test"
    return [each for key, each in results.items() if re.fullmatch(pattern, key)]


def _post_training_row(net, method, bits, runs, base):
    gaps = [100 * (each["accuracy"] - base["accuracy"]) for each in runs]
    mean = sum(gaps) / len(gaps)
    several = f" ({min(gaps):+.2f} to {max(gaps):+.2f})" if len(gaps) > 1 else ""
    accuracy = sum(each["accuracy"] for each in runs) / len(runs)
    return [
        net,
        method,
        bits,
        f"{accuracy:.2%}",
        f"{mean:+.2f}{several}",
        f"{round(sum(each['bytes'] for each in runs) / len(runs)):,}",
        f"{sum(each['seconds'] for each in runs) / len(runs):.0f}",
    ]


PARTS_LEFT_OUT = {
    "quantize": "nothing",
    "without_compensation": "compensated rounding",
    "without_layer_inputs": "layer inputs in the loss",
    "without_variation": "variations of the examples",
    "without_reach": "bounds of the weights",
    "without_statistics": "batch norm estimated again",
}


def parts():
    """What `quantize` loses without one of its parts, at 2 bits, on held-out images."""
    results = json.loads((STUDIES / "post-training.json").read_text())
    nets = [net for net in NETS if f"{net}-without_compensation-2-0-1024-held_out" in results]
    rows = []
    for method, name in PARTS_LEFT_OUT.items():
        found = [results.get(f"{net}-{method}-2-0-1024-held_out") for net in nets]
        cells = []
        if not any(found):
            continue
        for net, each in zip(nets, found, strict=True):
            base = results[f"{net}-float-held_out"]["accuracy"]
            cells += (
                ["", ""]
                if each is None
                else [
                    f"{100 * (each['accuracy'] - base):+.2f}",
                    f"{each['report']['movement']:.1%}",
                ]
            )
        rows.append([name, *cells])
    head = ["left out", *(f"{NETS[n]}: {what}" for n in nets for what in ("points", "movement"))]
    return markdown(head, rows)


def images():
    """Accuracy of the narrow net at 2 bits, by the number and the kind of images."""
    results = json.loads((STUDIES / "post-training.json").read_text())
    base = results["cnn_quarter-float-test"]["accuracy"]
    rows = []
    for number in (64, 128, 256, 512, 1024, 2048, 8192):
        found = results.get(f"cnn_quarter-quantize-2-0-{number}-test")
        if found:
            rows.append([f"{number:,} of the training set", found])
    for kind, name in (("mnist", "MNIST's digits, in grey"), ("noise", "noise")):
        found = results.get(f"cnn_quarter-quantize-2-0-1024-{kind}-test")
        if found:
            rows.append([f"1,024 of {name}", found])
    body = [
        [name, f"{each['accuracy']:.2%}", f"{100 * (each['accuracy'] - base):+.2f}"]
        for name, each in rows
    ]
    return markdown(["images", "accuracy", "to float"], body)


def drop():
    """What `max_accuracy_drop=0.01` reaches on the narrow net."""
    results = json.loads((STUDIES / "post-training.json").read_text())
    found = results["cnn_quarter-drop-any-0-1024-test"]
    base = results["cnn_quarter-float-test"]
    held_out = found["report"]["accuracy"]
    return (
        f"With `max_accuracy_drop=0.01` the net of 0.13 M weights ends at {found['mean_bits']:.2f} "
        f"mean bits, {found['bytes']:,} bytes: "
        f"{100 * (held_out['quantized'] - held_out['float']):+.2f} points on the 5,000 images that "
        f"decide, {100 * (found['accuracy'] - base['accuracy']):+.2f} on the test set "
        "(`python experiments/post_training.py --nets=cnn_quarter --methods=drop --seeds=0`)."
    )


def start():
    """Accuracy of the narrow net from a gradual descent and from a measured start."""
    folder = RESULTS / "cifar10-quarter"
    today, free, near = (
        json.loads((folder / f"{name}.json").read_text())
        for name in ("pareto", "measured-start-free", "measured-start")
    )
    rows = []
    for size in ("1.25", "1.5", "2", "3"):
        cells = []
        for study in (today, free, near):
            found = [
                each for each in study["runs"] if (each["kind"], each["size"]) == ("learned", size)
            ]
            mean = sum(each["test_accuracy"] for each in found) / len(found) if found else None
            seeds = "" if len(found) == 3 else f" ({len(found)} seed)"
            cells.append("" if mean is None else f"{mean:.2%}{seeds}")
        rows.append([size, *cells])
    head = ["mean bits", "gradual", "measured start, any widths at the freeze",
            "measured start, within one bit"]  # fmt: skip
    return markdown(head, rows)


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
    "post_trained": "the same, then trained",
    "hgq2": "HGQ2",
}


def hardware():
    """Accuracy against bit operations, and what the C++ takes."""
    points = json.loads((STUDIES / "hardware.json").read_text())["points"]
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


BLOCKS = {
    "README.md": {"post-training": post_training_in_short},
    "docs/exports.md": {
        "decisions": decisions,
        "sizes mnist": lambda: sizes("mnist"),
        "sizes cifar10": lambda: sizes("cifar10"),
        "latencies": latencies,
    },
    "docs/post_training.md": {"post-training": post_training, "images": images, "drop": drop},
    "docs/method.md": {"parts": parts, "start": start},
    "docs/hardware.md": {"hardware": hardware},
}


def main(argv):
    del argv
    for page, blocks in BLOCKS.items():
        text = new = (ROOT / page).read_text()
        for name, render in blocks.items():
            pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
            if not re.search(pattern, new, re.S):
                raise SystemExit(f"{page} must have markers for {name!r}.")
            new = re.sub(pattern, lambda m, r=render: f"{m[1]}\n{r()}\n\n{m[2]}", new, flags=re.S)
        if FLAGS.check and new != text:
            raise SystemExit(
                f"Tables of {page} differ from their files: run `python experiments/tables.py`."
            )
        if not FLAGS.check:
            (ROOT / page).write_text(new)


if __name__ == "__main__":
    app.run(main)
