"""Tables of `klb.quantize`."""

import re

from rendering.formats import markdown, study

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
    results = study("post-training")
    rows = []
    for net, title, base in _floats(results):
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
    results = study("post-training")
    rows = []
    for net, title, base in _floats(results):
        cells = []
        for bits in ("4", "3", "2"):
            runs = _runs(results, net, "quantize", bits)
            gaps = [100 * (each["accuracy"] - base["accuracy"]) for each in runs]
            cells.append(f"{sum(gaps) / len(gaps):+.2f}" if gaps else "")
        size = _runs(results, net, "quantize", "2")[0]["bytes"]
        rows.append([title, f"{base['accuracy']:.2%}", *cells, f"{base['bytes']:,}", f"{size:,}"])
    head = ["net", "float", "4 bits", "3 bits", "2 bits", "bytes, float", "bytes, 2 bits"]
    return markdown(head, rows)


def _floats(results):
    """Name, title and float result of each net that was measured."""
    for net, title in NETS.items():
        if f"{net}-float-test" in results:
            yield net, title, results[f"{net}-float-test"]


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
    results = study("post-training")
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
    results = study("post-training")
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
    results = study("post-training")
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
