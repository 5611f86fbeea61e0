"""What a training step with learned bits costs, beside one of plain Keras.

python experiments/overhead.py

Interleaved rounds in one process on random data; the ratio is that of the fastest rounds, since a
machine's cores come and go.
"""

import functools
import json
import os
import sys
import time

import cifar10
import keras
import mnist
import numpy as np
import tensorflow as tf
from absl import app, flags

import keras_learnbits as klb
from keras_learnbits.report import aligned_table

FLAGS = flags.FLAGS
flags.DEFINE_integer("rounds", 6, "Rounds of each kind of training.", lower_bound=1)
flags.DEFINE_integer("steps", 40, "Steps a round; a multiple of the estimators' interval.")
flags.DEFINE_string("policy", "mixed_bfloat16", "Keras dtype policy.")

NETS = {
    "MNIST LeNet, batch 128": (mnist.lenet, (28, 28, 1), 128),
    "CIFAR-10 net, batch 256": (cifar10.cnn, (32, 32, 3), 256),
}
KINDS = ("plain Keras", "frozen bits", "straight_through", "difference", "measured")


def _model(net, kind):
    if kind == "plain Keras":
        model, settings = keras.Model(*net(keras.layers.Conv2D, keras.layers.Dense)), {}
    else:
        layers = (functools.partial(c, bits=4) for c in (klb.LearnedBitConv2D, klb.LearnedBitDense))
        model = klb.LearnedBitModel(*net(*layers))
        settings = {"bit_gradient": "measured" if kind == "frozen bits" else kind}
    model.compile("adam", keras.losses.CategoricalCrossentropy(from_logits=True), **settings)
    return model


def _seconds_a_step(net, shape, batch_size):
    """Seconds of the fastest round's step, and to the end of the first step, of each kind."""
    rng = np.random.default_rng(0)
    x = tf.constant(rng.random((batch_size, *shape), "float32"))
    y = tf.constant(keras.utils.to_categorical(rng.integers(0, 10, batch_size), 10))
    data = tf.data.Dataset.from_tensors((x, y)).repeat()
    models, first, rounds = {}, {}, {kind: [] for kind in KINDS}
    for kind in KINDS:
        keras.utils.set_random_seed(0)
        models[kind] = _model(net, kind)
        start = time.perf_counter()
        models[kind].fit(data, steps_per_epoch=1, verbose=0)
        first[kind] = time.perf_counter() - start
        if kind == "frozen bits":
            models[kind].freeze_bits()
    for _ in range(FLAGS.rounds):
        for kind, model in models.items():
            start = time.perf_counter()
            model.fit(data, steps_per_epoch=FLAGS.steps, verbose=0)
            rounds[kind].append((time.perf_counter() - start) / FLAGS.steps)
    return {kind: min(each) for kind, each in rounds.items()}, first


def main(argv):
    del argv
    keras.config.set_dtype_policy(FLAGS.policy)
    results = {}
    for name, (net, shape, batch_size) in NETS.items():
        step, first = _seconds_a_step(net, shape, batch_size)
        results[name] = {
            kind: {
                "seconds_per_step": step[kind],
                "ratio": step[kind] / step["plain Keras"],
                "seconds_to_first_step": first[kind],
            }
            for kind in KINDS
        }
        head = (name, "ms a step", "ratio", "first step [s]")
        rows = [
            (
                kind,
                f"{1000 * row['seconds_per_step']:.1f}",
                f"{row['ratio']:.2f}",
                f"{row['seconds_to_first_step']:.1f}",
            )
            for kind, row in results[name].items()
        ]
        print(aligned_table([[head], rows], left=1), flush=True)
    output_dir = FLAGS.output_dir or os.path.join("runs", "overhead")
    os.makedirs(output_dir, exist_ok=True)
    command = " ".join(["python", "experiments/overhead.py", *sys.argv[1:]])
    with open(os.path.join(output_dir, "overhead.json"), "w") as file:
        json.dump({"command": command, "policy": FLAGS.policy, "nets": results}, file, indent=1)
    print(f"Files: {output_dir}")


if __name__ == "__main__":
    app.run(main)
