"""A gallery of nets other than image classifiers, quantized after training without labels.

TFDS_DATA_DIR=... python experiments/gallery.py
TFDS_DATA_DIR=... python experiments/gallery.py --tasks=transformer --targets=3

`gallery_tasks.py` has the nets and their data: segmentation (a U-Net), keyword spotting (DS-CNN;
needs the command `espeak-ng`), an autoencoder and a transformer. Each net is trained for a minute
or two (`<output_dir>/<task>.keras`), and quantized from `--sample` of its training inputs for each
of `--targets` mean bits and each of `--draws`, with the defaults of `klb.quantize`; no setting was
chosen for these tasks. Metrics are those of test data.

Latencies are measured separately, and again with `--latency_only`, on nets of random weights with
the widths that were found, in LiteRT, batch 1, one thread. Calls of all files are interleaved in
one process, and the fastest call counts. `--note` states the other load of the machine.

Every result is written to `<output_dir>/gallery.json` at once and is not computed again.
"""

import json
import os
import tempfile
import time

import common  # noqa: F401, for its flags
import keras
import numpy as np
import tensorflow as tf
from absl import app, flags
from gallery_tasks import TASKS
from latency import fastest
from runtimes import LiteRT, inputs_of

import keras_learnbits as klb
from keras_learnbits.tables import aligned_table

FLAGS = flags.FLAGS
flags.DEFINE_list("tasks", list(TASKS), "Names of tasks.")
flags.DEFINE_list("targets", ["3", "2"], "Mean bits per quantized weight.")
flags.DEFINE_list("draws", ["0"], "Seeds of the sample of inputs and of `quantize`.")
flags.DEFINE_integer("sample", 1024, "Number of unlabelled inputs.", lower_bound=8)
flags.DEFINE_integer("quantize_steps", None, "Training steps of `quantize`; its default if None.")
flags.DEFINE_bool("latency_only", False, "Only measure the latencies again.")
flags.DEFINE_string("note", None, "Other load of the machine while latencies were measured.")

# Latencies are those of the widths at this target.
LATENCY_TARGET = "3"
FILES = ("float", "own dynamic range", 'arithmetic="int8"')


def trained(name, task, data, path):
    """The float model of a task, which is trained if there is no file of it."""
    if os.path.exists(path):
        return keras.models.load_model(path)
    keras.utils.set_random_seed(0)
    net = task.build()
    epochs = FLAGS.epochs or task.epochs
    x, y = data
    steps = epochs * -(-len(x) // 64)
    rate = keras.optimizers.schedules.CosineDecay(2e-3, steps)
    net.compile(keras.optimizers.Adam(rate), **task.compile)
    net.fit(x, y, batch_size=64, epochs=epochs, verbose=2)
    print(f"{name}: {net.count_params():,} parameters", flush=True)
    net.save(path)
    return net


def scores(net, task, data):
    x, y = data
    return task.score(net.predict(x, batch_size=250, verbose=0), y)


def conversion(report):
    """Dictionary of the converted layers, and of those that keep float weights with reasons."""
    return {
        "learned_weights": report.learned_weights,
        "float_weights": report.float_weights,
        "rows": [list(row) for row in report.rows],
        "notes": report.notes,
    }


def quantized(net, task, train, test, target, draw):
    """One result of `quantize`, a dictionary."""
    x = train[0]
    rng = np.random.default_rng(draw)
    sample = x[rng.choice(len(x), min(FLAGS.sample, len(x)), replace=False)]
    small = klb.quantize(
        net,
        sample,
        target_bits=float(target),
        steps=FLAGS.quantize_steps,
        seed=draw,
        verbose=0,
    )
    report = small.quantization
    print(report, flush=True)
    return small, {
        "scores": scores(small, task, test),
        "mean_bits": report.table.mean_bits,
        "bits": [row.bits for row in report.table.rows],
        "packed_bytes": report.table.packed_bytes,
        "movement_rounded": report.movement_rounded,
        "movement": report.movement,
        "seconds": round(report.seconds, 1),
    }


def latency(task, bits, directory):
    """Milliseconds and bytes of LiteRT files of a net with random weights and these widths."""
    keras.utils.set_random_seed(0)
    net = task.build()
    learned = klb.to_learned_bits(net)
    kernels = [each for each in learned.quantized_tensors if hasattr(each, "kernel")]
    for kernel, width in zip(kernels, bits, strict=True):
        kernel.bits.assign(width)
        kernel.fit_scale()
    predictors, sizes = {}, {}
    writers = LiteRT.files(learned, None, net)
    for number, file in enumerate(FILES):
        path = os.path.join(directory, f"{number}.tflite")
        report = writers[file](path)
        if file.startswith("arithmetic"):
            print(report, flush=True)
        sizes[file] = os.path.getsize(path)
        predictors[file] = LiteRT.load(path, inputs_of(net, 1))
    seconds = fastest(predictors)
    return {
        "note": FLAGS.note,
        "calls": FLAGS.calls,
        "bytes": sizes,
        "milliseconds": {file: 1000 * taken for file, taken in seconds.items()},
        "ratio": {file: taken / seconds["float"] for file, taken in seconds.items()},
    }


def measure_latency(name, results, save):
    """Measures the latency of a task whose widths are known."""
    for found in results.get(name, {}).get("quantized", {}).get(LATENCY_TARGET, {}).values():
        with tempfile.TemporaryDirectory() as directory:
            results[name]["latency"] = latency(TASKS[name], found["bits"], directory)
        save()
        return


def study(name, results, save):
    """Trains, quantizes and scores the missing parts of a task."""
    task, start = TASKS[name], time.perf_counter()
    entry = results.setdefault(name, {})
    done = entry.setdefault("quantized", {})
    missing = [
        (target, draw)
        for draw in FLAGS.draws
        for target in FLAGS.targets
        if draw not in done.get(target, {})
    ]
    if not missing:
        return
    train, test = task.data(FLAGS.train_examples or task.examples, FLAGS.data_dir)
    path = os.path.join(directory_of_run(), f"{name}.keras")
    print(f"{name}: data after {time.perf_counter() - start:.0f} s", flush=True)
    net = trained(name, task, train, path)
    entry["float"] = {"scores": scores(net, task, test), "parameters": net.count_params()}
    print(f"{name}: {entry['float']['scores']}, {time.perf_counter() - start:.0f} s", flush=True)
    for target, draw in missing:
        small, found = quantized(net, task, train, test, target, int(draw))
        table = klb.bit_table(small)
        entry["conversion"] = conversion(small.conversion)
        entry["layers"] = [row.layer for row in table.rows]
        entry["weights"] = [row.weights for row in table.rows]
        entry["float"]["bytes"] = table.float_bytes
        done.setdefault(target, {})[draw] = found
        save()
        print(f"{name}, {target} bits, draw {draw}: {found['scores']}", flush=True)


def directory_of_run():
    return FLAGS.output_dir or os.path.join("runs", "gallery")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    os.makedirs(directory_of_run(), exist_ok=True)
    path = os.path.join(directory_of_run(), "gallery.json")
    results = {}
    if os.path.exists(path):
        with open(path) as file:
            results = json.load(file)["tasks"]

    def save():
        content = {
            "command": "python experiments/gallery.py",
            "versions": {module.__name__: module.__version__ for module in (klb, keras, tf)},
            "sample": FLAGS.sample,
            "tasks": results,
        }
        with open(f"{path}.new", "w") as file:
            json.dump(content, file, indent=1)
        os.replace(f"{path}.new", path)

    for name in FLAGS.tasks:
        if not FLAGS.latency_only:
            study(name, results, save)
        if FLAGS.latency_only or "latency" not in results[name]:
            measure_latency(name, results, save)
    print(summary(results))


def summary(results):
    """Table of the first metric of each task, mean over draws."""
    head = ("task", "metric", "target", "float", "quantized", "bytes", "of float", "latency")
    body = []
    for name, entry in results.items():
        for target, runs in entry["quantized"].items():
            metric = next(iter(entry["float"]["scores"]))
            size = np.mean([run["packed_bytes"] for run in runs.values()])
            ratio = entry.get("latency", {}).get("ratio", {}).get(FILES[-1])
            body.append(
                (name, metric, target, f"{entry['float']['scores'][metric]:.4f}",
                 f"{np.mean([run['scores'][metric] for run in runs.values()]):.4f}",
                 f"{size:,.0f}", f"{size / entry['float']['bytes']:.1%}",
                 "" if ratio is None else f"{ratio:.2f}")
            )  # fmt: skip
    return aligned_table([[head], body], left=2) + (
        "\ntarget: mean bits; of float: ratio of bytes; latency: int8 file relative to float"
    )


if __name__ == "__main__":
    app.run(main)
