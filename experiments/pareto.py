"""Accuracy against size: learned bits, the same bits in every layer, HGQ2's, and float.

TFDS_DATA_DIR=... python experiments/pareto.py --program=cifar10

Runs a program once for each method, size and seed, one run at a time, and skips runs whose result
file exists, so the program may be stopped and called again; `--recorded` takes finished runs from
the `pareto.json` of another machine. Every run starts from the float model of its seed, or of
`--start_seed`, which is trained first, and trains for `--finetune_epochs`. The float model is also
trained further, so that all methods see equally many examples. With `--start_seed` the spread does
not include that of the float models; keep such runs in a separate directory. Accuracies are those
of the last epoch. HGQ2 has no target for the size, so it runs at the prices of `--hgq2`
(`pip install hgq2==0.2.0`).
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import common  # noqa: F401, for its flags
import numpy as np
from absl import app, flags
from curves import plt

from keras_learnbits.tables import aligned_table

FLAGS = flags.FLAGS
flags.DEFINE_enum("program", "cifar10", ["cifar10", "digits", "mnist"], "Program to run.")
flags.DEFINE_list("budgets", ["1", "1.25", "1.5", "2", "3", "4"], "Mean bits of learned widths.")
flags.DEFINE_list("uniform", ["1", "2", "3", "4"], "Bits of every layer.")
flags.DEFINE_list("ends", ["1", "2"], "Bits of every layer but the first and last, which have 8.")
flags.DEFINE_list("hgq2", [], "Prices of HGQ2 as `<unit that has one bit-width>:<price>`.")
flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds.")
flags.DEFINE_string("start_seed", None, "Start all seeds from the float model of this seed.")
flags.DEFINE_string(
    "start_from", None, "Directory with `model.keras` and `result.json` of that float model."
)
flags.DEFINE_integer("float_epochs", None, "Epochs of the float model; the program's by default.")
flags.DEFINE_integer("finetune_epochs", 8, "Epochs that follow the training of the float model.")
flags.DEFINE_list(
    "finetune",
    ["optimizer=adamw", "learning_rate=3e-3", "weight_decay=0.05"],
    "Flags of the program for these epochs, except for the published method.",
)
flags.DEFINE_list(
    "learned", ["freeze_at=0.375", "interval=10"], "More flags of the program, for learned bits."
)
flags.DEFINE_list(
    "quantized", [], "More flags of the program, for all methods but float, e.g. activation_bits=8."
)
flags.DEFINE_list("hgq2_settings", [], "Flags of hgq2.py for all its runs, such as bits=2.")
flags.DEFINE_bool("train", True, "Do the missing runs; otherwise report the existing ones only.")

LABELS = {
    "learned": "learned bits",
    "uniform": "same bits in every layer",
    "ends": "8 bits in the first and last layer",
    "float": "float",
    "hgq2": "HGQ2, a width per",
    "paper": "published method",
}
flags.DEFINE_list("ways", list(LABELS), "Methods to compare.")
flags.DEFINE_string(
    "recorded",
    None,
    "A `pareto.json` of an earlier call with the same settings. Runs that it has are not repeated. "
    "Needs --start_from.",
)
flags.register_multi_flags_validator(
    ["start_from", "start_seed"],
    lambda given: not given["start_from"] or given["start_seed"],
    "--start_from needs --start_seed, the seed of its model.",
)
flags.register_multi_flags_validator(
    ["recorded", "start_from"],
    lambda given: not given["recorded"] or given["start_from"],
    "--recorded needs --start_from, the float model of the recorded runs.",
)
flags.register_validator(
    "ways", lambda ways: {*ways} <= {*LABELS}, f"--ways must be among {', '.join(LABELS)}."
)
MODELS = {"cifar10": "cnn", "mnist": "lenet", "digits": "cnn"}


def runs():
    """Name, seed, method, size and the program's flags of each run, seed by seed."""
    return (run for run in all_runs() if run[2] in ("start", *FLAGS.ways))


def start_of(seed):
    """Seed of the float model from which a seed's runs start."""
    return seed if FLAGS.start_seed is None else FLAGS.start_seed


def all_runs():
    """The same as `runs`, for all methods."""
    for number, seed in enumerate(FLAGS.seeds):
        start = start_of(seed)
        if start not in map(start_of, FLAGS.seeds[:number]):
            yield f"start-seed{start}", start, "start", None, ["--float"]
        yield f"float-seed{seed}", seed, "float", None, ["--float"]
        for bits in FLAGS.uniform:
            yield f"uniform{bits}-seed{seed}", seed, "uniform", bits, [f"--fixed_bits={bits}"]
        for bits in FLAGS.ends:
            fixed = [f"--fixed_bits={bits}", "--end_bits=8"]
            yield f"ends{bits}-seed{seed}", seed, "ends", bits, fixed
        for bits in FLAGS.budgets:
            yield f"learned{bits}-seed{seed}", seed, "learned", bits, [f"--target_bits={bits}"]
        yield f"paper-seed{seed}", seed, "paper", None, ["--bit_gradient=paper"]
        for point in FLAGS.hgq2:
            per, price = point.split(":")
            settings = [f"--program={FLAGS.program}", f"--per={per}", f"--price={price}"]
            yield f"hgq2-{per}{price}-seed{seed}", seed, "hgq2", point, settings


def do(name, seed, kind, settings, output_dir):
    """One run of the program; its output goes to a file in the directory of its results."""
    run_dir = os.path.join(output_dir, name)
    os.makedirs(run_dir, exist_ok=True)
    program = "hgq2" if kind == "hgq2" else FLAGS.program
    command = [sys.executable, os.path.join(os.path.dirname(__file__), f"{program}.py")]
    command += [*settings, f"--seed={seed}", f"--output_dir={run_dir}"]
    command += [] if kind == "hgq2" else [f"--model={FLAGS.model or MODELS[FLAGS.program]}"]
    if kind == "start":
        command += [f"--epochs={FLAGS.float_epochs}"] if FLAGS.float_epochs else []
    else:
        start = os.path.join(output_dir, f"start-seed{start_of(seed)}", "model.keras")
        command += [f"--init_from={start}", f"--epochs={FLAGS.finetune_epochs}"]
        more = [] if kind == "paper" else FLAGS.finetune
        more = more + {"learned": FLAGS.learned, "hgq2": FLAGS.hgq2_settings}.get(kind, [])
        more = more + (FLAGS.quantized if kind in ("learned", "uniform", "ends") else [])
        command += [f"--{flag}" for flag in more]
    if FLAGS.dtype_policy and kind not in ("hgq2", "paper"):
        command += [f"--dtype_policy={FLAGS.dtype_policy}"]
    command += ["--resume"] if FLAGS.resume and kind != "hgq2" else []
    command += [f"--validation_examples={FLAGS.validation_examples}"]
    print(f"{name}: {' '.join(command[1:])}", flush=True)
    with open(os.path.join(run_dir, "log.txt"), "w") as log:
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)


def recorded():
    """Rows of `--recorded`, by method, size and seed; without starts, whose models are needed."""
    if not FLAGS.recorded:
        return {}
    with open(FLAGS.recorded) as file:
        rows = json.load(file)["runs"]
    rows = (row for row in rows if row["kind"] != "start")
    return {(row["kind"], row["size"], str(row["seed"])): row for row in rows}


def collect(output_dir, earlier):
    """Results of the finished runs: method, target size, and the program's results.

    Args:
        output_dir: Directory of the runs.
        earlier: Rows that `recorded` returns, for runs that are not in the directory.
    """
    rows = []
    for name, seed, kind, size, _ in runs():
        path = os.path.join(output_dir, name, "result.json")
        if os.path.exists(path):
            with open(path) as file:
                result = json.load(file)
            row = {"kind": kind, "size": size, "seed": int(seed)}
            left_out = {"seed", "model", "dtype_policy", "seconds_per_epoch"}
            row |= {key: value for key, value in result.items() if key not in left_out}
            rows.append(row)
        elif (kind, size, seed) in earlier:
            rows.append(earlier[kind, size, seed])
    return rows


def summarize(rows):
    """Mean and spread over the seeds of each method and size, sorted by bytes.

    `above_uniform` is the gain over equal bits in every layer at the same number of bytes, which is
    interpolated linearly between the two neighbouring uniform models; None if there are not two.
    """
    groups = {}
    for row in rows:
        if row["kind"] != "start":
            groups.setdefault((row["kind"], row["size"]), []).append(row)
    points = []
    for (kind, size), group in groups.items():
        accuracies = [row["test_accuracy"] for row in group]
        points.append(
            {
                "kind": kind,
                "size": size,
                "seeds": len(group),
                "accuracy": float(np.mean(accuracies)),
                "spread": float(np.std(accuracies, ddof=1)) if len(group) > 1 else None,
                "loss": float(np.mean([row["test_loss"] for row in group])),
                "mean_bits": float(np.mean([row["mean_bits"] or 32 for row in group])),
                "bytes": float(
                    np.mean([row["packed_bytes"] or row["float_bytes"] for row in group])
                ),
            }
        )
    points.sort(key=lambda point: (list(LABELS).index(point["kind"]), point["bytes"]))
    uniform = [point for point in points if point["kind"] == "uniform"]
    for point in points:
        is_uniform = point["kind"] == "uniform"
        point["above_uniform"] = None if is_uniform else above_line(point, uniform)
    return points


def above_line(point, line):
    """Accuracy of a point minus the interpolated accuracy of others; None beyond their sizes.

    Up to 1% beyond their sizes, it is compared with the outermost point.

    Args:
        point: A point of `summarize`.
        line: Points sorted by bytes.
    """
    sizes, accuracies = ([each[key] for each in line] for key in ("bytes", "accuracy"))
    if not line or not 0.99 * sizes[0] <= point["bytes"] <= 1.01 * sizes[-1]:
        return None
    return point["accuracy"] - float(np.interp(point["bytes"], sizes, accuracies))


def label(point):
    """Name of a point's method in pictures and tables."""
    of_hgq2 = point["kind"] == "hgq2"
    return LABELS[point["kind"]] + (f" {point['size'].split(':')[0]}" if of_hgq2 else "")


def show(points):
    reference = [point["accuracy"] for point in points if point["kind"] == "float"]

    def in_points(share):
        return "" if share is None else f"{100 * share:+.2f}"

    def detail(point):
        size = (point["size"] or "").split(":")[-1]
        return {"hgq2": f", price {size}", "ends": f", {size} between"}.get(point["kind"], "")

    rows = [
        (
            label(point) + detail(point),
            f"{point['mean_bits']:.2f}",
            f"{point['bytes']:,.0f}",
            f"{point['accuracy']:.2%}",
            "" if point["spread"] is None else f"{100 * point['spread']:.2f}",
            in_points(point["accuracy"] - reference[0] if reference else None),
            in_points(point["above_uniform"]),
            f"{point['loss']:.3f}",
            str(point["seeds"]),
        )
        for point in points
    ]
    head = ("method", "mean bits", "bytes", "accuracy", "spread", "to float", "to uniform")
    head += ("loss", "seeds")
    print(aligned_table([[head], rows], left=1))
    print(
        "spread: standard deviation of seeds; to float, to uniform: difference of accuracy, points"
    )


def plot(points, path, title):
    """Accuracy against packed bytes, with the seeds' standard deviation; float as a line.

    Points of one seed are hollow; numbers are mean bits. Collapsed models, with less than half of
    the best accuracy, are in the table only.
    """
    least = 0.5 * max(point["accuracy"] for point in points)
    figure, axes = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    drawn = [p for p in points if p["kind"] not in ("float", "paper") and p["accuracy"] > least]
    for way in dict.fromkeys(map(label, drawn)):
        chosen = [point for point in drawn if label(point) == way]
        of_hgq2 = chosen[0]["kind"] == "hgq2"
        line = axes.errorbar(
            [point["bytes"] / 1000 for point in chosen],
            [100 * point["accuracy"] for point in chosen],
            yerr=[100 * (point["spread"] or 0) for point in chosen],
            linestyle=":" if of_hgq2 else "-",
            capsize=3,
            label=way,
        )[0]
        for point in chosen:
            x, y = point["bytes"] / 1000, 100 * point["accuracy"]
            face = "white" if point["seeds"] == 1 else line.get_color()
            axes.plot(x, y, "o", color=line.get_color(), markerfacecolor=face, zorder=3)
            above = point["kind"] == "learned"
            axes.annotate(
                f"{point['mean_bits']:.3g}",
                (x, y),
                xytext=(-4, 7) if above else (4, -13),
                textcoords="offset points",
                ha="right" if above else "left",
                fontsize=8,
                color=line.get_color(),
            )
    for point in (point for point in points if point["kind"] == "float"):
        size = f"float, {point['bytes'] / 1000:,.0f} kB"
        axes.axhline(100 * point["accuracy"], color="gray", linestyle="--", label=size)
    axes.set(xlabel="packed file [kB]", ylabel="test accuracy [%]", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=120)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    earlier = recorded()
    name = f"{FLAGS.program}-{FLAGS.model or MODELS[FLAGS.program]}"
    output_dir = FLAGS.output_dir or os.path.join("runs", f"pareto-{name}")
    os.makedirs(output_dir, exist_ok=True)
    if FLAGS.start_from:
        start = os.path.join(output_dir, f"start-seed{FLAGS.start_seed}")
        shutil.copytree(FLAGS.start_from, start, dirs_exist_ok=True)
    missing = [
        (run, seed, kind, settings)
        for run, seed, kind, size, settings in runs()
        if (kind, size, seed) not in earlier
        and not os.path.exists(os.path.join(output_dir, run, "result.json"))
    ]
    if FLAGS.train:
        if any(kind == "hgq2" for _, _, kind, _ in missing) and not importlib.util.find_spec("hgq"):
            raise app.UsageError("--hgq2 needs its package: pip install hgq2==0.2.0")
        for run in missing:
            do(*run, output_dir)
    rows = collect(output_dir, earlier)
    if not rows:
        raise app.UsageError(f"There are no results in {output_dir}.")
    points = summarize(rows)
    show(points)
    command = " ".join(["python", "experiments/pareto.py", *sys.argv[1:]])
    with open(os.path.join(output_dir, "pareto.json"), "w") as file:
        json.dump({"command": command, "points": points, "runs": rows}, file, indent=1)
    plot(points, os.path.join(output_dir, "pareto.png"), f"{name}: accuracy and size")
    print(f"Files: {output_dir}")


if __name__ == "__main__":
    app.run(main)
