"""Runs exported files in TFLite Micro, LiteRT's runtime for microcontrollers.

pip install tflite-micro
python experiments/latency.py --calls=1
python experiments/micro.py

Runs the LiteRT files of `runs/latency` on one random input, in TFLite Micro's interpreter for the
desktop, and compares the outputs with those of LiteRT. Writes
`experiments/results/studies/micro.json`.
"""

import importlib.metadata
import json
import pathlib

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from tflite_micro.python.tflite_micro import runtime

ROOT = pathlib.Path(__file__).parent.parent
FILES = ("float", 'arithmetic="float"', 'arithmetic="int8"', 'arithmetic="int8", activations=True')
NETS = ("LeNet", "CIFAR-10 net", "MobileNetV2", "ResNet-20", "dense net", "transformer")
ARENA = 100_000_000  # bytes; a microcontroller has less


def path_of(net, file):
    """The path to which latency.py writes a file."""
    slug = "".join(c if c.isalnum() else "_" for c in f"{net} LiteRT {file}")
    return str(ROOT / "runs" / "latency" / f"{slug}.tflite")


def in_litert(path):
    interpreter = Interpreter(path)
    (given,) = interpreter.get_input_details()
    (found,) = interpreter.get_output_details()
    interpreter.allocate_tensors()
    x = np.random.default_rng(0).random(given["shape"]).astype(given["dtype"])
    interpreter.set_tensor(given["index"], x)
    interpreter.invoke()
    return x, interpreter.get_tensor(found["index"])


def in_micro(path, x):
    interpreter = runtime.Interpreter.from_file(path, arena_size=ARENA)
    interpreter.set_input(x, 0)
    interpreter.invoke()
    return interpreter.get_output(0)


def main():
    rows = []
    for net in NETS:
        for file in FILES:
            path = path_of(net, file)
            x, expected = in_litert(path)
            try:
                found = in_micro(path, x)
            except RuntimeError:  # the reason is printed to stderr
                difference = None
            else:
                difference = float(np.abs(found - expected).max() / np.abs(expected).max())
            rows.append({"net": net, "file": file, "difference": difference})
            print(f"{net}, {file}: {'does not run' if difference is None else difference}")
    result = {
        "command": "python experiments/micro.py",
        "versions": {"tflite_micro": importlib.metadata.version("tflite_micro")},
        "rows": rows,
    }
    path = ROOT / "experiments" / "results" / "studies" / "micro.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
