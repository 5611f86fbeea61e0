"""Reproduces the tables and figures of the published method.

TFDS_DATA_DIR=... python experiments/published.py

Runs `mnist.py` and `cifar10.py --bit_gradient=paper` once for each setting, one run at a time, and
skips runs whose result file exists, so it may be stopped and called again. Prints errors and bits
together with the published ones (Raghavan et al., arXiv 1708.04788), and writes them to
`published.json`, and a picture.

The rate is halved every 200 steps. Of the sum of the rate over all steps, 5 epochs on MNIST have
98.7% and 4 epochs 97%, after which bits no longer move; 2 epochs, for the nets of 7 and 8 layers,
have 87%. On CIFAR-10 30 epochs have all but 1e-9 of it; the paper trained for 100.
"""

import json
import math
import os
import subprocess
import sys

import common  # noqa: F401, for its flags
import numpy as np
from absl import app, flags
from curves import plt

import keras_learnbits as klb
from keras_learnbits.tables import aligned_table

FLAGS = flags.FLAGS
flags.DEFINE_list(
    "loss_weights", ["1", "3", "5"], "Weights of the loss, to find the published one."
)
flags.DEFINE_bool("train", True, "Do the missing runs; otherwise report the existing ones only.")

SHORT = "--epochs=5"
# Published test error in percent, and bits of each layer, by number of layers.
MNIST = {
    4: (11.16, (5, 6, 7, 6)),
    5: (10.46, (5, 6, 6, 6, 5)),
    6: (9.12, (5, 6, 6, 6, 6, 5)),
    7: (8.35, (5, 5, 6, 6, 6, 6, 5)),
    8: (7.21, (5, 6, 5, 6, 6, 6, 7, 5)),
}
DRAWN = "MNIST, 4 layers"
CIFAR10 = 42.08, (5, 6, 7, 5)
FLOAT_ON_MNIST = 19.95
SETTINGS = {
    "lambda1 = 1e-4": ["--quantization_reg=1e-4"],
    "lambda1 = 1e-2": ["--quantization_reg=1e-2"],
    "lambda2 = 1e-7": ["--bit_reg=1e-7"],
    "lambda2 = 1e-5": ["--bit_reg=1e-5"],
    "lambda1 = 1, lambda2 = 0": ["--quantization_reg=1", "--bit_reg=0"],
    "lambda1 = 0, lambda2 = 1": ["--quantization_reg=0", "--bit_reg=1"],
    "linear price": ["--bit_penalty=widths"],
}
PUBLISHED_SETTINGS = {
    "lambda1 = 1, lambda2 = 0": (11.18, (32,)),
    "lambda1 = 0, lambda2 = 1": (13.09, (2, 2, 2, 2)),
}


def runs():
    """Name, program, flags, published error and bits of each run."""
    yield "MNIST, 4 layers", "mnist", [], *MNIST[4]
    yield "CIFAR-10, 4 layers", "cifar10", ["--epochs=30"], *CIFAR10
    for name, flag in SETTINGS.items():
        flag = ["--nobaseline", *flag, SHORT]
        yield name, "mnist", flag, *PUBLISHED_SETTINGS.get(name, (None, ()))
    linear = ["--float", "--round_each_epoch=8", SHORT]
    yield "linear-8", "mnist", linear, None, ()
    for depth in (5, 6, 7, 8):
        epochs = {5: [SHORT], 6: ["--epochs=4", "--nobaseline"]}
        epochs = epochs.get(depth, ["--epochs=2", "--nobaseline"])
        flag = [f"--model=lenet32_{depth}", *epochs]
        yield f"MNIST, {depth} layers", "mnist", flag, *MNIST[depth]
    for weight in FLAGS.loss_weights:
        flag = f"--loss_weight={weight}"
        yield f"float, loss times {weight}", "mnist", ["--float", flag, SHORT], None, ()


def directory(name, output_dir):
    """The directory of a run's files."""
    return os.path.join(output_dir, name.replace(",", "").replace(" ", "-"))


def do(name, program, settings, output_dir):
    """One run of a program; its output goes to a file in the directory of its results."""
    run_dir = directory(name, output_dir)
    os.makedirs(run_dir, exist_ok=True)
    command = [sys.executable, os.path.join(os.path.dirname(__file__), f"{program}.py")]
    command += ["--bit_gradient=paper", *settings]
    command += [f"--seed={FLAGS.seed}"] if FLAGS.seed else []
    command += [f"--output_dir={run_dir}"]
    print(f"{name}: {' '.join(command[1:])}", flush=True)
    with open(os.path.join(run_dir, "log.txt"), "w") as log:
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)


def curve(path):
    """Each layer's bits after each change: dictionary of name to `[step, bits]` pairs."""
    if not os.path.exists(path):
        return {}
    with open(path) as file:
        names = file.readline().strip().split(",")[1:]
        table = np.loadtxt(file, delimiter=",")
    kept = {}
    for name, bits in zip(names, table[:, 1:].T, strict=True):
        changed = np.flatnonzero(np.diff(bits, prepend=np.nan))
        kept[name] = [[int(table[row, 0]), int(bits[row])] for row in changed]
    return kept


def balanced_bits(path, flags):
    """Bit-widths at which error and price balance, for each kernel of a packed file.

    With errors distributed uniformly over a step, `dQ/dB = -ln(2) N R^2 / (12 * 4^B)` for `N`
    weights in a range of `R`, and the price's derivative is `lambda2 ln(2) 2^B`. They are equal at

        B = log2(lambda1 N R^2 / (12 lambda2)) / 3

    This does not depend on the task.
    """
    given = dict(flag.lstrip("-").split("=") for flag in flags if "=" in flag)
    lambda1 = float(given.get("quantization_reg", 1e-3))
    lambda2 = float(given.get("bit_reg", 1e-6))
    if not lambda1 or not lambda2 or "bit_penalty" in given or not os.path.exists(path):
        return []
    kernels = [array for array in klb.load_packed(path).values() if array.ndim > 1]
    squares = [kernel.size * float(np.ptp(kernel)) ** 2 for kernel in kernels]
    return [round(math.log2(lambda1 * square / (12 * lambda2)) / 3, 2) for square in squares]


def collect(output_dir):
    """List of a dictionary for each finished run."""
    rows = []
    for name, _, settings, error, bits in runs():
        run_dir = directory(name, output_dir)
        path = os.path.join(run_dir, "result.json")
        if os.path.exists(path):
            with open(path) as file:
                result = json.load(file)
            curves = curve(os.path.join(run_dir, "bits.csv"))
            last = [changes[-1][0] for changes in curves.values()]
            of_float = result["float_test_accuracy"]
            rows.append(
                {
                    "name": name,
                    "command": result["command"].split(" --output_dir")[0],
                    "versions": result["versions"],
                    "epochs": result["epochs"],
                    "error": 100 * (1 - result["test_accuracy"]),
                    "float_error": None if of_float is None else 100 * (1 - of_float),
                    "published_error": error,
                    "bits": list(result["bits"].values()),
                    "published_bits": list(bits),
                    "balanced_bits": balanced_bits(
                        os.path.join(run_dir, "model.safetensors"), settings
                    ),
                    "settled_at_step": max(last, default=None),
                    "curves": curves if name == DRAWN else {},
                }
            )
    return rows


def show(rows):
    """Prints the results of the runs."""

    def percent(error):
        return "" if error is None else f"{error:.2f}%"

    def listed(bits):
        return " ".join(map(str, bits))

    head = ("run", "error", "float", "published", "bits", "published", "balance", "last change")
    table = [
        (
            row["name"],
            percent(row["error"]),
            percent(row["float_error"]),
            percent(row["published_error"]),
            listed(row["bits"]),
            listed(row["published_bits"]),
            listed(f"{bits:.1f}" for bits in row["balanced_bits"]),
            "" if row["settled_at_step"] is None else f"{row['settled_at_step']:,}",
        )
        for row in rows
    ]
    print(aligned_table([[head], table], left=1))
    print("balance: bits at which error and price balance; last change: training step of the bits")


def plot(rows, path):
    """Bits over steps, as in the paper's figure 2; errors of nets of 4 to 8 layers and of float."""
    found = {row["name"]: row for row in rows}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    row = found[DRAWN]
    end, steps_per_epoch = 10, 250
    for (layer, changes), published in zip(
        row["curves"].items(), row["published_bits"], strict=True
    ):
        steps, bits = np.transpose([*changes, [end * steps_per_epoch, changes[-1][1]]])
        label = f"{layer}: {bits[-1]} bits (published {published})"
        left.step(steps / steps_per_epoch, bits, where="post", label=label)
    left.axvline(5, color="gray", linestyle=":", label="published: settled within 5 epochs")
    left.set(xlim=(0, end), xlabel="epoch", ylabel="bit-width [bits]", title="MNIST, 4 layers")
    left.grid(alpha=0.3)
    left.legend(fontsize=8)
    depths = [depth for depth in MNIST if f"MNIST, {depth} layers" in found]
    nets = [found[f"MNIST, {depth} layers"] for depth in depths]
    floats = [np.nan if net["float_error"] is None else net["float_error"] for net in nets]
    right.plot(depths, floats, "o-", label="float, here")
    right.plot(depths, [net["error"] for net in nets], "s-", label="published method, here")
    right.plot(depths, [MNIST[depth][0] for depth in depths], "k^--", label="method, as published")
    right.plot([4], [FLOAT_ON_MNIST], "kx", label="float, as published")
    right.set(xlabel="layers", ylabel="test error [%]", xticks=depths, ylim=(0, None))
    right.set_title(f"MNIST, nets of {depths[0]} to {depths[-1]} layers")
    right.grid(alpha=0.3)
    right.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv):
    del argv
    output_dir = FLAGS.output_dir or os.path.join("runs", "published")
    for name, program, settings, *_ in runs():
        done = os.path.exists(os.path.join(directory(name, output_dir), "result.json"))
        if FLAGS.train and not done:
            do(name, program, settings, output_dir)
    rows = collect(output_dir)
    with open(os.path.join(output_dir, "published.json"), "w") as file:
        json.dump({"command": "python experiments/published.py", "runs": rows}, file, indent=1)
    show(rows)
    if DRAWN in {row["name"] for row in rows}:
        plot(rows, os.path.join(output_dir, "published.png"))
    print(f"Files: {output_dir}")


if __name__ == "__main__":
    app.run(main)
