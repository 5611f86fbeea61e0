"""Growth of the cost of learned bits with the numbers of weights and layers.

python experiments/scaling.py

Compares training with learned bits, with the default settings, with plain Keras on random data: the
additional time of a step for each weight of one wide dense layer and for each layer of a deep net;
the time of the first step; and the additional peak memory, measured in separate processes.
"""

import functools
import gc
import json
import os
import subprocess
import sys
import time

import common  # noqa: F401, for its flags
import keras
import measuring
import numpy as np
import tensorflow as tf
from absl import app, flags
from curves import plt

import keras_learnbits as klb
from keras_learnbits.tables import aligned_table

FLAGS = flags.FLAGS
flags.DEFINE_list(
    "weights", ["1e3", "1e4", "1e5", "1e6", "1e7", "1e8"], "Numbers of weights of one dense layer."
)
flags.DEFINE_list("layers", ["5", "15", "50", "150", "500"], "Numbers of dense layers.")
flags.DEFINE_integer("rounds", 4, "Rounds of each kind of training.", lower_bound=1)
flags.DEFINE_integer("steps", 20, "Steps per round; a multiple of the estimators' interval.")
flags.DEFINE_string("peak_of", None, "Print the peak memory of this kind with --weights, and exit.")

KINDS = ("plain Keras", "learned bits")


def wide(kind, weights):
    """One dense layer of about `weights` weights, four times as wide as its input."""
    inputs = max(1, round((weights / 4) ** 0.5))
    return _compiled(kind, inputs, [round(weights / inputs)])


def deep(kind, layers):
    """A stack of `layers` dense layers of 32 x 32 weights."""
    return _compiled(kind, 32, [32] * layers)


def _compiled(kind, size, widths):
    x = inputs = keras.Input((size,))
    for width in widths:
        x = keras.layers.Dense(width, activation="relu")(x)
    model = keras.Model(inputs, x)
    if kind != "plain Keras":
        model = klb.to_learned_bits(model, bits=4)
    model.compile("sgd", "mse")
    return model


def batches(model):
    x = tf.random.normal((32, model.input.shape[-1]))
    y = tf.random.normal((32, model.output.shape[-1]))
    return measuring.repeated(x, y)


def measure(build, size):
    """Seconds per step, and seconds to the end of the first step, by kind."""
    found, models = {}, {}
    for kind in KINDS:
        model = build(kind, size)
        data = batches(model)
        start = time.perf_counter()
        model.fit(data, steps_per_epoch=1, verbose=0)
        found[kind] = {"first_step": time.perf_counter() - start, "step": float("inf")}
        models[kind] = model, data
    for _ in range(FLAGS.rounds):
        for kind, (model, data) in models.items():
            start = time.perf_counter()
            model.fit(data, steps_per_epoch=FLAGS.steps, verbose=0)
            seconds = (time.perf_counter() - start) / FLAGS.steps
            found[kind]["step"] = min(found[kind]["step"], seconds)
    keras.backend.clear_session()
    return found


def peak(kind, weights):
    """Peak memory of all tensors in a separate process that trains one wide layer, in bytes."""
    command = [sys.executable, __file__, f"--peak_of={kind}", f"--weights={weights}"]
    command += [f"--steps={FLAGS.steps}"]
    environment = os.environ | measuring.COUNTING
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout.split()[-1])


def print_peak():
    model = wide(FLAGS.peak_of, float(FLAGS.weights[0]))
    data = batches(model)
    gc.collect()
    fit = functools.partial(model.fit, data, steps_per_epoch=FLAGS.steps, verbose=0)
    print(measuring.peak_of_tensors(fit))


def extra(rows, key):
    """Additional cost of learned bits compared with plain Keras, for each size."""
    return np.array([row["learned bits"][key] - row["plain Keras"][key] for row in rows])


def slope(sizes, values):
    """Slope and intercept of a linear fit with the least relative error."""
    sizes, values = np.array(sizes, float), np.array(values)
    weights = 1 / np.maximum(np.abs(values), np.median(np.abs(values)) / 100)
    return np.polyfit(sizes, values, 1, w=weights)


def plot(panels, path):
    """Panels of points with their linear fits, both axes logarithmic."""
    figure, all_axes = plt.subplots(1, len(panels), figsize=(13, 4), layout="constrained")
    for axes, (title, unit, sizes, values, fit) in zip(all_axes, panels, strict=True):
        axes.loglog(sizes, values, "o", label="measured")
        line = np.geomspace(min(sizes), max(sizes), 100)
        axes.loglog(line, np.polyval(fit, line), label=f"{fit[0]:.3g} x {fit[1]:+.3g}")
        axes.set(xlabel=unit[0], ylabel=unit[1], title=title)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    if FLAGS.peak_of:
        print_peak()
        return
    weights, layers = [float(n) for n in FLAGS.weights], [int(n) for n in FLAGS.layers]
    by_weights, by_layers = [measure(wide, n) for n in weights], [measure(deep, n) for n in layers]
    large = [n for n in weights if n >= 1e6] or weights[-1:]
    peaks = [{kind: {"peak": peak(kind, n)} for kind in KINDS} for n in large]
    panels = [
        ("step, one layer", ("weights", "extra ms"), weights, 1e3 * extra(by_weights, "step")),
        ("step, deep net", ("layers", "extra ms"), layers, 1e3 * extra(by_layers, "step")),
        ("first step", ("layers", "extra s"), layers, extra(by_layers, "first_step")),
        ("peak memory", ("weights", "extra MB"), large, extra(peaks, "peak") / 1e6),
    ]
    panels = [(*panel, slope(*panel[2:])) for panel in panels]
    for title, unit, sizes, values, fit in panels:
        rows = [(f"{n:,.0f}", f"{v:.3f}") for n, v in zip(sizes, values, strict=True)]
        print(f"\n{title}: {fit[0]:.3g} {unit[1].split()[1]} for each of the {unit[0]}")
        print(aligned_table([[unit], rows], left=0), flush=True)
    print("extra: with learned bits minus plain Keras")
    output_dir = FLAGS.output_dir or os.path.join("runs", "scaling")
    os.makedirs(output_dir, exist_ok=True)
    results = {
        "command": " ".join(["python", "experiments/scaling.py", *sys.argv[1:]]),
        "weights": dict(zip(FLAGS.weights, by_weights, strict=True)),
        "layers": dict(zip(FLAGS.layers, by_layers, strict=True)),
        "peaks": dict(zip(map(str, large), peaks, strict=True)),
        "slopes": {title: float(fit[0]) for title, *_, fit in panels},
    }
    with open(os.path.join(output_dir, "scaling.json"), "w") as file:
        json.dump(results, file, indent=1)
    plot(panels, os.path.join(output_dir, "scaling.png"))
    print(f"Files: {output_dir}")


if __name__ == "__main__":
    app.run(main)
