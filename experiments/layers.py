"""The bits that each layer gets, and the reasons: bits, weights and sensitivity of each layer.

TFDS_DATA_DIR=... python experiments/layers.py --study=runs/pareto-cifar10-cnn

Reads the files of `pareto.py`. Bits are means over the seeds at each budget. Sensitivity is the
increase of the loss if one layer of the float model is rounded, with the scales of least squared
error and without further training. It is the loss of `fit`, with batch statistics and without
augmentation, on the last training examples (`--validation_examples` or 5000), on which the model
was trained unless they were held out.
"""

import json
import os
import sys

import cifar10
import keras
import mnist
import numpy as np
from absl import app, flags
from curves import plt
from loading import dataset
from sensitivity import sensitivities

from keras_learnbits.tables import aligned_table

PROBLEMS = {"cifar10": cifar10.PROBLEM, "mnist": mnist.PROBLEM}
WIDTHS = (1, 2, 3, 4)
FLAGS = flags.FLAGS
flags.DEFINE_enum("program", "cifar10", sorted(PROBLEMS), "Program with the data.")
flags.DEFINE_string("study", "runs/pareto-cifar10-cnn", "Directory of pareto.py's files.")


def learned_bits(study):
    """Mean bits over the seeds: dictionary of budget to dictionary of layer to bits."""
    budgets = {}
    for run in study["runs"]:
        if run["kind"] == "learned":
            budgets.setdefault(run["size"], []).append(run["bits"])
    return {
        budget: {layer: float(np.mean([run[layer] for run in runs])) for layer in runs[0]}
        for budget, runs in sorted(budgets.items(), key=lambda item: float(item[0]))
    }


def plot(bits, weights, added, path, title):
    layers, budgets = list(weights), list(bits)
    grid = np.array([[bits[budget][layer] for budget in budgets] for layer in layers])
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(11, 0.42 * len(layers) + 1.8), sharey=True, layout="constrained"
    )
    left.imshow(grid, cmap="viridis", vmin=1, vmax=8, aspect="auto")
    for row, column in np.ndindex(*grid.shape):
        value = grid[row, column]
        color = "black" if value > 5 else "white"
        left.text(column, row, f"{value:.3g}", ha="center", va="center", color=color, fontsize=9)
    left.set_xticks(range(len(budgets)), budgets)
    left.set_yticks(range(len(layers)), layers)
    left.set(xlabel="budget [mean bits per weight]", title="learned bits, mean of seeds")
    positions = np.arange(len(layers))
    middle.plot(list(weights.values()), positions, "o", color="gray")
    middle.set(xscale="log", xlabel="weights", title="size")
    for index, width in enumerate(WIDTHS[:3]):
        values = [max(added[layer][index], 1e-5) for layer in layers]
        right.plot(values, positions, "o", label="1 bit" if width == 1 else f"{width} bits")
    right.set(xscale="log", xlabel="added loss [nats]", title="float, only this layer rounded")
    right.legend()
    for panel in (middle, right):
        panel.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    with open(os.path.join(FLAGS.study, "pareto.json")) as file:
        bits = learned_bits(json.load(file))
    float_model = keras.models.load_model(
        os.path.join(FLAGS.study, f"start-seed{FLAGS.seed}", "model.keras")
    )
    problem = PROBLEMS[FLAGS.program]
    (x, y), _ = problem.load(FLAGS.data_dir)
    held_out = FLAGS.validation_examples or 5000
    data = dataset(x[-held_out:], y[-held_out:], 250).cache()
    smoothing = problem.defaults_of(float_model.name)["label_smoothing"]
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=smoothing)
    added = sensitivities(float_model, data, loss, WIDTHS)
    weights = {name: int(np.size(float_model.get_layer(name).kernel)) for name in added}
    head = (
        "layer",
        "weights",
        *(f"{b} mean bits" for b in bits),
        *(f"+loss at {w}" for w in WIDTHS),
    )
    rows = [
        (
            layer,
            f"{weights[layer]:,}",
            *(f"{of[layer]:.3g}" for of in bits.values()),
            *(f"{loss:.2g}" for loss in added[layer]),
        )
        for layer in weights
    ]
    print(aligned_table([[head], rows], left=1))
    print("mean bits: learned bits at each budget; +loss at: added by rounding only this layer")
    result = {
        "command": " ".join(["python", "experiments/layers.py", *sys.argv[1:]]),
        "bits": bits,
        "weights": weights,
        "widths": WIDTHS,
        "loss_added": added,
    }
    output_dir = FLAGS.output_dir or FLAGS.study
    os.makedirs(output_dir, exist_ok=True)
    with open(os.path.join(output_dir, "layers.json"), "w") as file:
        json.dump(result, file, indent=1)
    title = f"{FLAGS.program}: bits of each layer"
    plot(bits, weights, added, os.path.join(output_dir, "layers.png"), title)
    print(f"Files: {output_dir}")


if __name__ == "__main__":
    app.run(main)
