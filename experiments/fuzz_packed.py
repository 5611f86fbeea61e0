"""Fuzzing of packed files: damaged and forged files must be refused, quickly and by name.

python experiments/fuzz_packed.py --files=100000

Packs small models. Worker processes read mutations of these files: truncated, flipped and spliced
ones, and ones with false lengths, shapes, bits and types. A worker that dies counts as a crash, one
that does not end as a hang. `packed_mutations.py` has the mutations.
"""

import collections
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile

import keras
import numpy as np
import safetensors
from absl import app, flags

import keras_learnbits as klb
from keras_learnbits.export.packed import save_packed

FLAGS = flags.FLAGS
flags.DEFINE_integer("files", 100_000, "Number of mutated files to read.", lower_bound=1)
flags.DEFINE_integer("files_per_worker", 5_000, "Number of files per process.", lower_bound=1)
flags.DEFINE_float("timeout", 10, "Seconds per 100 files after which a worker counts as hanging.")
flags.DEFINE_integer("seed", 0, "Seed of models and mutations.")
flags.DEFINE_string("output_dir", "runs/fuzz_packed", "Directory of fuzz_packed.json.")

WORKER = pathlib.Path(__file__).with_name("packed_mutations.py")


def models():
    """Small models that together have every part of the format."""
    inputs = keras.Input((6, 6, 2))
    x = klb.LearnedBitConv2D(4, 3, bits=1, name="conv")(inputs)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Flatten()(x)
    yield klb.LearnedBitModel(inputs, klb.LearnedBitDense(3, bits=5, name="dense")(x))

    inputs = keras.Input((5,))
    affine = {"kernel_quantizer": "min_max", "bits": 13, "max_bits": 16}
    x = keras.layers.Normalization()(inputs)  # has an integer among its weights
    yield klb.LearnedBitModel(inputs, klb.LearnedBitDense(4, **affine)(x))

    inputs = keras.Input((4, 3))
    yield klb.LearnedBitModel(inputs, klb.LearnedBitWrapper(keras.layers.GRU(3), bits=3)(inputs))


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    keras.utils.set_random_seed(FLAGS.seed)
    counts, crashes, hangs = collections.Counter(), [], 0
    slowest, peak, done = 0.0, 0, 0
    with tempfile.TemporaryDirectory() as directory:
        for index, model in enumerate(models()):
            for kind, options in {
                "": {},
                "-config": {"include_config": True},
                "-bfloat16": {"float_dtype": "bfloat16"},
            }.items():
                path = os.path.join(directory, f"{index}{kind}.safetensors")
                save_packed(model, path, **options)
        while done < FLAGS.files:
            files = min(FLAGS.files_per_worker, FLAGS.files - done)
            command = [sys.executable, WORKER, directory, str(FLAGS.seed + done), str(files)]
            try:
                worker = subprocess.run(
                    command,
                    capture_output=True,
                    text=True,
                    timeout=FLAGS.timeout * (1 + files / 100),
                )
            except subprocess.TimeoutExpired:
                hangs += 1
            else:
                if worker.returncode:
                    counts["crashes"] += 1
                    crashes.append(f"exit code {worker.returncode}: {worker.stderr}")
                else:
                    result = json.loads(worker.stdout)
                    counts.update(result["counts"])
                    crashes += result["crashes"]
                    slowest = max(slowest, result["slowest_seconds"])
                    peak = max(peak, result["peak_bytes"])
            done += files
            print(f"{done:,} files, {counts['crashes']} crashes, {hangs} hangs", flush=True)
    outcomes = ("refused", "read", "read_otherwise_unnoticed")
    result = {
        "command": " ".join(["python", "experiments/fuzz_packed.py", *sys.argv[1:]]),
        "versions": {
            "keras_learnbits": klb.__version__,
            "safetensors": safetensors.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "seed": FLAGS.seed,
        "files": done,
        **{outcome: counts[outcome] for outcome in outcomes},
        "crashes": counts["crashes"],
        "hangs": hangs,
        "slowest_read_seconds": slowest,
        "peak_memory_bytes": peak,
        "by_mutation": {key: counts[key] for key in sorted(counts) if " " in key},
        "first_crashes": crashes[:10],
    }
    os.makedirs(FLAGS.output_dir, exist_ok=True)
    with open(os.path.join(FLAGS.output_dir, "fuzz_packed.json"), "w") as file:
        json.dump(result, file, indent=1)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    app.run(main)
