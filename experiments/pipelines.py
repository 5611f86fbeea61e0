"""Share of a training step that is spent on the model, and not on waiting for data.

TFDS_DATA_DIR=... python experiments/pipelines.py

For each program, compares the seconds of an epoch from its input pipeline with as many steps on one
repeated batch, and with the pipeline alone. These take turns, and the lowest times are compared.
"""

import json
import os
import sys
import time

import cifar10
import digits
import keras
import measuring
import mnist
from absl import app, flags
from loading import dataset

import keras_learnbits as klb
from keras_learnbits.tables import aligned_table

FLAGS = flags.FLAGS
flags.DEFINE_integer("rounds", 3, "Number of rounds.", lower_bound=1)
flags.DEFINE_list("programs", ["digits", "mnist", "cifar10"], "Programs to measure.")


def measure(problem):
    """Lowest seconds of an epoch from the pipeline, on a repeated batch, and of the pipeline alone.

    For the pipeline alone also CPU seconds, which the model lacks if no core is idle.
    """
    name, net = next(iter(problem.nets.items()))
    settings = problem.defaults_of(name)
    keras.config.set_dtype_policy(settings.get("dtype_policy") or "float32")
    model = klb.LearnedBitModel(*net(klb.LearnedBitConv2D, klb.LearnedBitDense))
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"], bit_reg=settings["bit_reg"])
    train, _ = problem.load(FLAGS.data_dir)
    data = dataset(*train, settings["batch_size"], problem.augment, shuffle_seed=0)
    steps = data.cardinality().numpy() - 1  # the last batch is smaller
    repeated = measuring.repeated(*next(iter(data)))

    def seconds(data):
        start = time.perf_counter()
        model.fit(data, steps_per_epoch=steps, verbose=0)
        return time.perf_counter() - start

    def alone():
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in data.take(steps):
            pass
        return time.perf_counter() - wall, time.process_time() - cpu

    seconds(repeated.take(2 * steps))
    turns = [(seconds(data), seconds(repeated), *alone()) for _ in range(FLAGS.rounds)]
    return [min(turn) for turn in zip(*turns, strict=True)]


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    problems = {"digits": digits, "mnist": mnist, "cifar10": cifar10}
    results = {}
    for name in FLAGS.programs:
        epoch, of_model, of_data, cpu = measure(problems[name].PROBLEM)
        policy = keras.config.dtype_policy().name
        results[name] = {
            "epoch_seconds": epoch,
            "model_seconds": of_model,
            "data_seconds": of_data,
            "data_cpu_seconds": cpu,
            "dtype_policy": policy,
        }
    rows = [
        (
            name,
            f"{r['epoch_seconds']:.2f}",
            f"{r['model_seconds'] / r['epoch_seconds']:.1%}",
            f"{r['data_seconds']:.2f}",
            f"{r['data_cpu_seconds']:.2f}",
        )
        for name, r in results.items()
    ]
    head = ("program", "epoch [s]", "model", "data alone [s]", "data CPU [s]")
    print(aligned_table([[head], rows], left=1))
    print("model: share of the epoch without waiting for data; data alone: the input pipeline")
    output_dir = FLAGS.output_dir or os.path.join("runs", "pipelines")
    os.makedirs(output_dir, exist_ok=True)
    command = " ".join(["python", "experiments/pipelines.py", *sys.argv[1:]])
    with open(os.path.join(output_dir, "pipelines.json"), "w") as file:
        json.dump({"command": command, "programs": results}, file, indent=1)
    print(f"Files: {output_dir}")


if __name__ == "__main__":
    app.run(main)
