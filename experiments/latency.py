"""Latency of exported files, compared with the float files of the same nets.

python experiments/latency.py
python experiments/latency.py --of=LeNet --output_dir=runs/latency

Nets have random weights and a mean width of about 3 bits; kernels have 1 to 5 bits in turn. Each
float file is converted as its runtime's documentation describes: LiteRT by
`TFLiteConverter.from_keras_model`, ONNX by tf2onnx. The references are each runtime's 8-bit
conversions of the float model: LiteRT's dynamic range and full integer, onnxruntime's static
quantization. One thread; batches of 1 and of 32; calls of all files are interleaved in one process,
and the fastest call counts. Ratios are relative to the float file of the same runtime in the same
run.

OpenVINO runs the ONNX files where it is installed (`pip install openvino`).
"""

import importlib.util
import json
import os
import sys
import time

import cifar10
import common  # noqa: F401, for its flags
import keras
import mnist
import numpy as np
import onnxruntime
import overhead
import tensorflow as tf
from absl import app, flags
from runtimes import CALIBRATION, RUNTIMES, inputs_of, without_constants

import keras_learnbits as klb
from keras_learnbits.tables import aligned_table

FLAGS = flags.FLAGS
flags.DEFINE_list("of", None, "Names of nets; all by default.")
flags.DEFINE_integer("calls", 60, "Number of calls of each file.", lower_bound=1)

L = keras.layers


def transformer():
    """Two encoder blocks of width 128 over 64 positions, with ReLU: tf2onnx lacks exact GELU."""
    x = inputs = keras.Input((64, 128))
    for _ in range(2):
        y = L.LayerNormalization()(x)
        x = L.Add()([x, L.MultiHeadAttention(4, 32)(y, y)])
        y = L.Dense(512, activation="relu")(L.LayerNormalization()(x))
        x = L.Add()([x, L.Dense(128)(y)])
    return inputs, L.Dense(10)(L.GlobalAveragePooling1D()(x))


BATCHES = (1, 32)
WIDTHS = (1, 2, 3, 4, 5, 2, 3)
NETS = {
    "LeNet": lambda: mnist.lenet(L.Conv2D, L.Dense),
    "CIFAR-10 net": lambda: cifar10.cnn(L.Conv2D, L.Dense),
    "MobileNetV2": overhead.mobilenet,
    "ResNet-20": lambda: cifar10.resnet20(L.Conv2D, L.Dense),
    "dense net": overhead.dense_net,
    "transformer": transformer,
}


def make_nets(name):
    """A net with random weights and statistics, converted: without and with activations.

    Kernels have 1 to 5 bits, activations 8.
    """
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    # tf2onnx makes the constants of `Normalization` inputs.
    net = keras.models.clone_model(keras.Model(*NETS[name]()), clone_function=without_constants)
    for layer in net.layers:
        if isinstance(layer, L.BatchNormalization):
            layer.gamma.assign(rng.uniform(0.5, 1.5, layer.gamma.shape))
            layer.beta.assign(rng.normal(0, 0.1, layer.beta.shape))
            layer.moving_mean.assign(rng.normal(0, 0.1, layer.beta.shape))
            layer.moving_variance.assign(rng.uniform(0.5, 1.5, layer.beta.shape))
    learned = klb.to_learned_bits(net), klb.to_learned_bits(net, activations=True)
    for model in learned:
        kernels = [t for t in model.quantized_tensors if hasattr(t, "kernel")]
        for number, kernel in enumerate(kernels):
            kernel.bits.assign(WIDTHS[number % len(WIDTHS)])
            kernel.fit_scale()
    for seed in range(CALIBRATION):
        learned[1](inputs_of(net, 16, seed), training=True)
    return learned


def fastest(predictors):
    """Seconds of the fastest of interleaved calls, by name."""
    seconds = dict.fromkeys(predictors, np.inf)
    for predict in predictors.values():
        predict()
    for _ in range(FLAGS.calls):
        for name, predict in predictors.items():
            start = time.perf_counter()
            predict()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def measure(name, directory):
    """Milliseconds and bytes of each file of a net: a list of dictionaries."""
    learned, with_activations = make_nets(name)
    plain = klb.to_keras(learned)
    rows, predictors = [], {size: {} for size in BATCHES}
    for runtime, kind in RUNTIMES.items():
        if runtime == "OpenVINO" and not importlib.util.find_spec("openvino"):
            continue
        for file, write in kind.files(learned, with_activations, plain).items():
            slug = "".join(c if c.isalnum() else "_" for c in f"{name} {runtime} {file}")
            path = os.path.join(directory, slug + kind.ending)
            try:
                write(path)
                for size in BATCHES:
                    predictors[size][runtime, file] = kind.load(path, inputs_of(plain, size))
            except Exception as error:  # a runtime's own conversion may not take a net
                print(f"{name}, {runtime}, {file}: {type(error).__name__}: {str(error)[:200]}")
                for size in BATCHES:
                    predictors[size].pop((runtime, file), None)
                continue
            rows.append(
                {
                    "net": name,
                    "runtime": runtime,
                    "file": file,
                    "bytes": os.path.getsize(path),
                    "milliseconds": {},
                    "ratio": {},
                    "difference": _difference(
                        predictors[BATCHES[0]][runtime, file],
                        with_activations if file.endswith("activations=True") else learned,
                    )
                    if file.startswith("arithmetic")
                    else None,
                }
            )
    for size in BATCHES:
        seconds = fastest(predictors[size])
        for row in rows:
            taken = seconds[row["runtime"], row["file"]]
            row["milliseconds"][size] = 1000 * taken
            row["ratio"][size] = taken / seconds[row["runtime"], "float"]
    return rows


def _difference(predict, model):
    """The largest difference of outputs from the model's, relative to the largest output."""
    expected = model.predict(inputs_of(model, BATCHES[0]), verbose=0)
    return float(np.abs(predict() - expected).max() / np.abs(expected).max())


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    directory = FLAGS.output_dir or os.path.join("runs", "latency")
    os.makedirs(directory, exist_ok=True)
    rows = []
    for name in FLAGS.of or NETS:
        rows += measure(name, directory)
        result = {
            "command": " ".join(["python", "experiments/latency.py", *sys.argv[1:]]),
            "versions": {m.__name__: m.__version__ for m in (klb, keras, tf, onnxruntime)},
            "rows": rows,
        }
        with open(os.path.join(directory, "result.json"), "w") as file:
            json.dump(result, file, indent=1)
    head = ("net", "runtime", "file", "bytes", "of float",
            *(f"batch {size} [ms]" for size in BATCHES),
            *(f"of float, batch {size}" for size in BATCHES), "difference")  # fmt: skip
    floats = {(r["net"], r["runtime"]): r["bytes"] for r in rows if r["file"] == "float"}
    body = [
        (r["net"], r["runtime"], r["file"], f"{r['bytes']:,}",
         f"{r['bytes'] / floats[r['net'], r['runtime']]:.1%}",
         *(f"{r['milliseconds'][size]:.2f}" for size in BATCHES),
         *(f"{r['ratio'][size]:.2f}" for size in BATCHES),
         "" if r["difference"] is None else f"{r['difference']:.1e}")
        for r in rows
    ]  # fmt: skip
    print(aligned_table([[head], body], left=3))
    print(
        "of float: ratio to the runtime's float file; difference: to the model, of largest output"
    )


if __name__ == "__main__":
    app.run(main)
