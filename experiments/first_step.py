"""Time of the first training step, which TensorFlow mostly spends on tracing and optimizing it.

python experiments/first_step.py

Measures CPU seconds of the first step of `fit`, in one process, for a plain Keras model, for its
conversion, and for its conversion with quantized activations. Prints a table, and writes
`first_step.json`.
"""

import json
import os
import sys
import time

import keras
import numpy as np
from absl import app, flags

import keras_learnbits as klb
from keras_learnbits.tables import aligned_table

FLAGS = flags.FLAGS
flags.DEFINE_string("output_dir", "runs/first_step", "Directory of first_step.json.")


def mobilenet():
    """MobileNetV2 at 96x96, and a batch of 8 images."""
    model = keras.applications.MobileNetV2(
        weights=None, input_shape=(96, 96, 3), classes=10, classifier_activation=None
    )
    return model, np.random.normal(size=(8, 96, 96, 3)), np.random.normal(size=(8, 10))


def dense_layers():
    """300 dense layers of 32 units, and a batch of 32 examples."""
    x = inputs = keras.Input((32,))
    for _ in range(300):
        x = keras.layers.Dense(32, activation="relu")(x)
    return keras.Model(inputs, x), np.random.normal(size=(32, 32)), np.random.normal(size=(32, 32))


def first_step(model, x, y):
    """CPU seconds of the first step of `fit`."""
    model.compile("adam", "mse")
    start = time.process_time()
    model.fit(x, y, verbose=0)
    return time.process_time() - start


def main(argv):
    del argv
    first_step(keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)]), *np.ones((2, 4, 2)))
    found = {}
    for name, make in (("MobileNetV2", mobilenet), ("300 dense layers", dense_layers)):
        keras.utils.set_random_seed(0)
        model, x, y = make()
        found[name] = {"plain Keras": first_step(model, x, y)}
        for kind, activations in (("weights", False), ("weights and activations", True)):
            found[name][kind] = first_step(
                klb.to_learned_bits(model, activations=activations), x, y
            )
            print(f"{name}, {kind}: {found[name][kind]:.1f} s", flush=True)
    kinds = list(found["MobileNetV2"])
    rows = [(name, *(f"{seconds[kind]:.1f}" for kind in kinds)) for name, seconds in found.items()]
    print(aligned_table([[("CPU seconds of the first step", *kinds)], rows], left=1))
    print("weights, weights and activations: with learned bits for these")
    os.makedirs(FLAGS.output_dir, exist_ok=True)
    result = {"command": " ".join(["python", "experiments/first_step.py", *sys.argv[1:]]), **found}
    with open(os.path.join(FLAGS.output_dir, "first_step.json"), "w") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    app.run(main)
