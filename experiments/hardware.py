"""Circuits: accuracy against bit operations, and whether the C++ equals the model.

TFDS_DATA_DIR=... python experiments/hardware.py --output_dir=runs/hardware

For each net and seed a float model is trained. Then it is trained for `--finetune_epochs` with
steps that are powers of two and with quantized activations. `uniform` has the same width in all
weights and activations, each of `--budgets`. `learned` has learned widths within as many bit
operations. `post` quantizes the float model without labels, to each of `--budgets` as mean bits
and with 6-bit activations; `post_trained` trains it afterwards with labels. `hgq2` is HGQ2 by the
recipe of its documentation, from scratch for the same total number of epochs, at the prices
`--hgq2` (`pip install hgq2==0.2.0`). Each model of this library is exported for hls4ml, and its
C++, compiled by g++, is compared with the model on the whole test set. Every result is written to a
file at once and is not computed again.

Nets: `jets`, dense layers 16-64-32-32-5 as for jet tagging, on data that scikit-learn generates;
`digits`, a CNN for scikit-learn's handwritten digits of 8x8; `mnist`, a small CNN.
"""

import json
import os
import tempfile
import time

import keras
import numpy as np
from absl import app, flags
from curves import plt
from loading import load_tfds
from matplotlib import ticker
from sklearn.datasets import load_digits, make_classification
from sklearn.model_selection import train_test_split

import keras_learnbits as klb
from keras_learnbits.tables import aligned_table

FLAGS = flags.FLAGS
flags.DEFINE_list("nets", ["digits", "jets", "mnist"], "Names of nets.")
flags.DEFINE_list("ways", ["learned", "uniform", "hgq2"], "Methods to compare.")
flags.DEFINE_list("budgets", ["2", "3", "4", "6"], "Bits of weights and activations.")
flags.DEFINE_list("hgq2", ["3e-7", "1e-6", "3e-6", "1e-5"], "Prices of an EBOP, in loss.")
flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds.")
flags.DEFINE_integer(
    "finetune_epochs", None, "Epochs with quantization; by default as many as of the float model."
)
flags.DEFINE_bool("compile", True, "Whether to export, compile and compare the C++.")
flags.DEFINE_string("data_dir", None, "Directory of prepared data of tensorflow_datasets.")
flags.DEFINE_string("output_dir", os.path.join("runs", "hardware"), "Directory of the results.")

L = keras.layers
EPOCHS = {"jets": 20, "digits": 40, "mnist": 4}
BATCH_SIZE = {"jets": 256, "digits": 32, "mnist": 128}


def jets_data():
    """20,000 points of five classes in 16 dimensions, a quarter of them for the test."""
    x, y = make_classification(
        20_000, n_features=16, n_informative=12, n_redundant=2, n_classes=5,
        n_clusters_per_class=3, class_sep=2.0, flip_y=0.02, random_state=0,
    )  # fmt: skip
    x = (x / x.std(axis=0)).astype("float32")
    x, x_test, y, y_test = train_test_split(x, y, test_size=0.25, random_state=0)
    return (x, y), (x_test, y_test)


def digits_data():
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype("float32").reshape(-1, 8, 8, 1)
    x, x_test, y, y_test = train_test_split(
        images, labels, test_size=360, stratify=labels, random_state=0
    )
    return (x, y), (x_test, y_test)


def mnist_data():
    train, test = load_tfds("mnist", FLAGS.data_dir)
    return tuple((images.astype("float32") / 255, labels) for images, labels in (train, test))


def jets(Conv2D, Dense):
    inputs = x = keras.Input((16,))
    for units in (64, 32, 32):
        x = Dense(units, activation="relu")(x)
    return keras.Model(inputs, Dense(5)(x))


def digits(Conv2D, Dense):
    inputs = keras.Input((8, 8, 1))
    x = Conv2D(8, 3, padding="same", activation="relu")(inputs)
    x = Conv2D(16, 3, activation="relu")(L.MaxPooling2D(2)(x))
    x = Dense(32, activation="relu")(L.Flatten()(x))
    return keras.Model(inputs, Dense(10)(x))


def mnist(Conv2D, Dense):
    inputs = keras.Input((28, 28, 1))
    x = L.MaxPooling2D(2)(Conv2D(8, 3, activation="relu")(inputs))
    x = L.MaxPooling2D(2)(Conv2D(16, 3, activation="relu")(x))
    return keras.Model(inputs, Dense(10)(L.Flatten()(x)))


DATA = {"jets": jets_data, "digits": digits_data, "mnist": mnist_data}
NETS = {"jets": jets, "digits": digits, "mnist": mnist}


def train(model, net, data, epochs, callbacks=(), rate=3e-3, **settings):
    steps = epochs * -(-len(data[0]) // BATCH_SIZE[net])
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(rate, steps)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        **settings,
    )
    model.fit(*data, batch_size=BATCH_SIZE[net], epochs=epochs, callbacks=list(callbacks),
              verbose=0)  # fmt: skip


def operations_at(float_net, bits):
    """Bit operations with equal bits in all weights and activations."""
    table = klb.bit_table(quantizable(float_net, bits))
    return table.bit_operations


def quantizable(float_net, bits, fixed=False):
    """The net with power-of-two steps, and the same width in weights and activations."""
    bounds = {"min_bits": bits, "max_bits": bits} if fixed else {"min_bits": 1, "max_bits": 8}
    activations = {"bits": bits, "min_bits": max(bounds["min_bits"], 2),
                   "max_bits": bounds["max_bits"]}  # fmt: skip
    return klb.to_learned_bits(
        float_net, bits=bits, activations=activations, power_of_two=True, **bounds
    )


def learned(net, float_net, data, bits, epochs):
    """A model with learned widths within the bit operations of equal widths."""
    model = quantizable(float_net, 8)
    budget = klb.BitBudget(
        target_bit_operations=operations_at(float_net, bits), start=data[0][:1024]
    )
    train(model, net, data, epochs, [budget], rate=1e-3)
    return model


def uniform(net, float_net, data, bits, epochs):
    """A model with equal widths."""
    model = quantizable(float_net, bits, fixed=True)
    train(model, net, data, epochs, rate=1e-3)
    return model


def post(net, float_net, data, bits, epochs):
    """A model that `quantize` makes without labels."""
    return klb.quantize(
        float_net, data[0], target_bits=bits, activations={"bits": 6}, power_of_two=True, verbose=0
    )


def post_trained(net, float_net, data, bits, epochs):
    """A model with the widths of `post`, trained with labels."""
    model = klb.quantize(
        float_net, data[0], target_bits=bits, activations={"bits": 6}, power_of_two=True, steps=0,
        verbose=0,
    )  # fmt: skip
    train(model, net, data, epochs, rate=1e-3)
    return model


def compared(model, x):
    """Seconds of an export, and the largest difference of C++ and model on the test set."""
    with tempfile.TemporaryDirectory() as directory:
        start = time.perf_counter()
        graph = klb.export_hls4ml(model, os.path.join(directory, "project"))
        seconds = time.perf_counter() - start
        found = graph.predict(np.ascontiguousarray(x))
    expected = model.predict(x, batch_size=500, verbose=0)
    return {
        "export_seconds": round(seconds, 1),
        "largest_difference": float(np.max(np.abs(found.reshape(expected.shape) - expected))),
    }


def run(net, way, size, seed, float_net, data, test):
    """One result, a dictionary."""
    epochs = FLAGS.finetune_epochs or EPOCHS[net]
    keras.utils.set_random_seed(seed)
    if way == "hgq2":
        import hardware_hgq2

        return hardware_hgq2.run(
            NETS[net], net, data, test, float(size), EPOCHS[net] + epochs, BATCH_SIZE[net]
        )
    makers = {"learned": learned, "uniform": uniform, "post": post, "post_trained": post_trained}
    make = makers[way]
    model = make(net, float_net, data, int(size), epochs)
    table = klb.bit_table(model)
    logits = model.predict(test[0], batch_size=500, verbose=0)
    return {
        "accuracy": float(np.mean(logits.argmax(axis=-1) == test[1])),
        "bit_operations": table.bit_operations,
        "bits": [row.bits for row in table.rows],
        "input_bits": [row.input_bits for row in table.rows],
        **(compared(model, test[0]) if FLAGS.compile else {}),
    }


def load(path):
    if not os.path.exists(path):
        return {}
    with open(path) as file:
        return json.load(file)


def save(path, key, result):
    results = load(path) | {key: result}
    with open(f"{path}.new", "w") as file:
        json.dump(results, file, indent=1)
    os.replace(f"{path}.new", path)
    print(key, result, flush=True)


def float_net_of(net, seed, data, test, path):
    """The float model of a seed, from a file if it exists; its result goes to the file `path`."""
    file = os.path.join(FLAGS.output_dir, f"{net}-{seed}.keras")
    if os.path.exists(file):
        model = keras.models.load_model(file)
    else:
        keras.utils.set_random_seed(seed)
        model = NETS[net](L.Conv2D, L.Dense)
        train(model, net, data, EPOCHS[net])
        model.save(file)
    key = f"{net}-float-32-{seed}"
    if key not in load(path):
        accuracy = model.evaluate(*test, verbose=0, return_dict=True)["accuracy"]
        save(path, key, {"accuracy": accuracy})
    return model


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    os.makedirs(FLAGS.output_dir, exist_ok=True)
    path = os.path.join(FLAGS.output_dir, "results.json")
    for net in FLAGS.nets:
        data, test = DATA[net]()
        for seed in map(int, FLAGS.seeds):
            float_net = float_net_of(net, seed, data, test, path)
            for way in FLAGS.ways:
                for size in FLAGS.hgq2 if way == "hgq2" else FLAGS.budgets:
                    key = f"{net}-{way}-{size}-{seed}".replace("e-", "e_")
                    if key not in load(path):
                        save(path, key, run(net, way, size, seed, float_net, data, test))
    points = summarize(load(path))
    print(table_of(points))
    with open(os.path.join(FLAGS.output_dir, "hardware.json"), "w") as file:
        json.dump({"points": points, "runs": load(path)}, file, indent=1)
    plot(points, os.path.join(FLAGS.output_dir, "hardware.png"))


def summarize(results):
    """Mean over seeds of each net, way and size: a list of dictionaries."""
    groups = {}
    for key, result in results.items():
        net, way, size, _ = key.split("-")
        groups.setdefault((net, way, size), []).append(result)
    floats = {net: mean(runs, "accuracy") for (net, way, _), runs in groups.items()
              if way == "float"}  # fmt: skip
    return [
        {
            "net": net,
            "way": way,
            "size": size.replace("e_", "e-"),
            "seeds": len(runs),
            "accuracy": mean(runs, "accuracy"),
            "spread": float(np.std([each["accuracy"] for each in runs])),
            "gap": floats[net] - mean(runs, "accuracy"),
            "bit_operations": mean(runs, "bit_operations"),
            "export_seconds": mean(runs, "export_seconds"),
            "largest_difference": max(
                (each["largest_difference"] for each in runs if "largest_difference" in each),
                default=None,
            ),
        }
        for (net, way, size), runs in groups.items()
    ]


def mean(runs, key):
    values = [each[key] for each in runs if each.get(key) is not None]
    return float(np.mean(values)) if values else None


def table_of(points):
    body = [
        (
            point["net"],
            point["way"],
            point["size"],
            str(point["seeds"]),
            "" if point["bit_operations"] is None else f"{point['bit_operations'] / 1e3:,.0f}",
            f"{point['accuracy']:.2%}",
            f"{100 * point['gap']:+.2f}",
            "" if point["export_seconds"] is None else f"{point['export_seconds']:.0f}",
            "" if point["largest_difference"] is None else f"{point['largest_difference']:g}",
        )
        for point in sorted(points, key=lambda p: (p["net"], p["way"], p["bit_operations"] or 0))
    ]
    head = ("net", "way", "size", "seeds", "bit operations [k]", "accuracy", "gap [points]",
            "export [s]", "difference")  # fmt: skip
    return aligned_table([[head], body], left=3) + (
        "\nsize: bits, or price of HGQ2; gap: to float; difference: largest, between C++ and model"
    )


STYLES = {
    "learned": ("learned bits", "C0"),
    "uniform": ("equal bits", "C1"),
    "post": ("quantize, no labels", "C2"),
    "post_trained": ("quantize, then trained", "C3"),
    "hgq2": ("HGQ2 (EBOPs)", "C4"),
}
COLLAPSED = 0.1  # models that lose more accuracy are in the table only


def plot(points, path):
    """Accuracy against bit operations for each net; bars are one standard deviation."""
    nets = sorted({point["net"] for point in points})
    figure, axes = plt.subplots(1, len(nets), figsize=(4.2 * len(nets), 4.2), layout="constrained")
    handles = {}
    for net, axis in zip(nets, np.atleast_1d(axes), strict=True):
        of_net = [p for p in points if p["net"] == net and p["gap"] < COLLAPSED]
        for way, (label, color) in STYLES.items():
            chosen = sorted(
                (p for p in of_net if p["way"] == way), key=lambda p: p["bit_operations"]
            )
            if chosen:
                handles[label] = axis.errorbar(
                    [p["bit_operations"] / 1000 for p in chosen],
                    [100 * p["accuracy"] for p in chosen],
                    yerr=[100 * p["spread"] for p in chosen],
                    marker="o",
                    capsize=3,
                    color=color,
                )
        (of_float,) = (p for p in of_net if p["way"] == "float")
        line = axis.axhline(100 * of_float["accuracy"], color="gray", linestyle="--")
        handles["float"] = line
        axis.set(xscale="log", xlabel="bit operations per example [thousands]", title=net,
                 ylabel="test accuracy [%]")  # fmt: skip
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axis.grid(alpha=0.3)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    app.run(main)
