"""Seconds of a training step of ResNet-20 with Keras's batch normalization and with the fused one.

python experiments/fused.py

Prints a table, and writes `fused.json` to `--output_dir`.
"""

import json
import os
import sys
import time

import cifar10
import keras
import nets
import numpy as np
from absl import app, flags
from measuring import repeated

from keras_learnbits.tables import aligned_table

FLAGS = flags.FLAGS
flags.DEFINE_integer("batch_size", 256, "Examples per step.")
flags.DEFINE_integer("steps", 20, "Steps per round.")
flags.DEFINE_integer("rounds", 5, "Rounds, in turns; the fastest counts.")
flags.DEFINE_list("policies", ["float32", "mixed_bfloat16"], "Keras dtype policies.")
flags.DEFINE_string("output_dir", os.path.join("runs", "fused"), "Directory of the result.")
LAYERS = {"Keras": keras.layers.BatchNormalization, "fused": nets.BatchNormalization}


def compiled(layer, policy):
    """ResNet-20 with one of the layers."""
    keras.config.set_dtype_policy(policy)
    cifar10.BatchNormalization = layer
    model = nets.float_model(cifar10.resnet20, "resnet20")
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss)
    return model


def main(argv):
    del argv
    rng = np.random.default_rng(0)
    images = rng.random((FLAGS.batch_size, 32, 32, 3), np.float32)
    labels = keras.utils.to_categorical(rng.integers(0, 10, FLAGS.batch_size), 10)
    batches = repeated(images, labels)
    seconds = {}
    for policy in FLAGS.policies:
        models = {name: compiled(layer, policy) for name, layer in LAYERS.items()}
        for model in models.values():
            model.fit(batches, steps_per_epoch=2, verbose=0)
        for _ in range(FLAGS.rounds):
            for name, model in models.items():
                start = time.perf_counter()
                model.fit(batches, steps_per_epoch=FLAGS.steps, verbose=0)
                taken = (time.perf_counter() - start) / FLAGS.steps
                found = seconds.setdefault(policy, {})
                found[name] = min(taken, found.get(name, np.inf))
    rows = [
        [policy, *(f"{1000 * each:.0f}" for each in found.values()),
         f"{found['fused'] / found['Keras']:.2f}"]
        for policy, found in seconds.items()
    ]  # fmt: skip
    print(aligned_table([[["policy", "Keras [ms]", "fused [ms]", "ratio"]], rows], left=1))
    print("milliseconds per training step, of the fastest rounds")
    os.makedirs(FLAGS.output_dir, exist_ok=True)
    command = " ".join(["python", "experiments/fused.py", *sys.argv[1:]])
    with open(os.path.join(FLAGS.output_dir, "fused.json"), "w") as file:
        json.dump({"command": command, "seconds_per_step": seconds}, file, indent=1)
    print(f"Files: {FLAGS.output_dir}")


if __name__ == "__main__":
    app.run(main)
