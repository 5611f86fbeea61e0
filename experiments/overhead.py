"""Time of a training step with learned bits, compared with plain Keras.

python experiments/overhead.py
python experiments/overhead.py --policy=mixed_bfloat16

Runs interleaved rounds in one process on random data. Ratios are those of the fastest rounds and of
the lowest CPU seconds, because other programs use the machine's cores at times. Peak memory is that
of all tensors in a separate training process, once for plain Keras and once for learned bits. HGQ2
and QKeras are included if they are installed (`pip install hgq2==0.2.0`; `pip install
qkeras-v3==1.2.1`, in a separate environment); see `hgq2_twins.py` and `qkeras_twins.py`.
"""

import functools
import gc
import importlib.util
import json
import os
import subprocess
import sys
import time

import common  # noqa: F401, for its flags
import keras
import measuring
import mnist
import numpy as np
import tensorflow as tf
from absl import app, flags
from curves import plt

import keras_learnbits as klb
from keras_learnbits.tables import aligned_table

FLAGS = flags.FLAGS
flags.DEFINE_integer("rounds", 10, "Rounds of each kind of training.", lower_bound=1)
flags.DEFINE_integer("steps", 20, "Steps per round; a multiple of the estimators' interval.")
flags.DEFINE_string("policy", "float32", "Keras dtype policy.")
flags.DEFINE_list("nets", None, "Names of nets; all by default.")
flags.DEFINE_list("kinds", None, "Kinds of training other than plain Keras; all by default.")
flags.DEFINE_bool("metrics", False, "Train with a metric, which Keras makes in the first step.")
flags.DEFINE_bool("memory", True, "Also measure peak memory.")
flags.DEFINE_string("peak_of", None, "Print the peak memory of this kind of training, and exit.")

L = keras.layers


def lenet():
    return mnist.lenet(L.Conv2D, L.Dense)


def resnet20():
    """ResNet-20 for CIFAR-10 (arXiv 1512.03385)."""

    def convolved(x, filters, strides=1):
        x = L.Conv2D(filters, 3, strides=strides, padding="same", use_bias=False)(x)
        return L.BatchNormalization()(x)

    inputs = keras.Input((32, 32, 3))
    x = L.ReLU()(convolved(inputs, 16))
    for filters in (16, 32, 64):
        for block in range(3):
            strides = 2 if block == 0 and filters > 16 else 1
            y = convolved(L.ReLU()(convolved(x, filters, strides)), filters)
            if strides > 1:
                x = L.AveragePooling2D(1, strides=2)(x)
                x = L.Concatenate()([x, L.Rescaling(0.0)(x)])
            x = L.ReLU()(L.Add()([x, y]))
    return inputs, L.Dense(10)(L.GlobalAveragePooling2D()(x))


def dense_net():
    inputs = keras.Input((784,))
    x = L.Dense(2048, activation="relu")(inputs)
    return inputs, L.Dense(10)(L.Dense(2048, activation="relu")(x))


def transformer():
    """Two encoder blocks of width 128 over 64 positions."""
    x = inputs = keras.Input((64, 128))
    for _ in range(2):
        y = L.LayerNormalization()(x)
        x = L.Add()([x, L.MultiHeadAttention(4, 32)(y, y)])
        y = L.Dense(512, activation="gelu")(L.LayerNormalization()(x))
        x = L.Add()([x, L.Dense(128)(y)])
    return inputs, L.Dense(10)(L.GlobalAveragePooling1D()(x))


def mobilenet():
    net = keras.applications.MobileNetV2((96, 96, 3), weights=None, classifier_activation=None)
    return net.inputs[0], net.outputs[0]


# Dictionary of name to net and batch size.
NETS = {
    "LeNet": (lenet, 128),
    "ResNet-20": (resnet20, 128),
    "dense net": (dense_net, 128),
    "transformer": (transformer, 64),
    "MobileNetV2": (mobilenet, 16),
}
LEARNED = {
    "frozen bits": {},
    "frozen, no error": {"quantization_reg": 0.0},
    "straight_through": {"bit_gradient": "straight_through"},
    "difference": {"bit_gradient": "difference"},
    "measured": {},
}
KINDS = ("plain Keras", *LEARNED)
# HGQ2 installs a different package that is also named `qkeras`.
OTHERS = {"HGQ2": "hgq", "QKeras": "qkeras"}
KINDS += tuple(name for name, package in OTHERS.items() if importlib.util.find_spec(package))[:1]


def twin_of(library):
    """Function from a Keras layer to that of another library."""
    if library == "HGQ2":
        import hgq2_twins

        return functools.partial(hgq2_twins.twin, integer_bits=0)
    import qkeras_twins

    return qkeras_twins.twin


def make_model(net, kind):
    """A compiled model of one kind of training."""
    keras.utils.set_random_seed(0)
    model, settings = keras.Model(*net()), {}
    if kind in LEARNED:
        model, settings = klb.to_learned_bits(model, bits=4), LEARNED[kind]
    elif kind in OTHERS:
        model = keras.models.clone_model(model, clone_function=twin_of(kind))
    outputs = model.output.shape[-1]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"] if FLAGS.metrics else None, **settings)
    return model, outputs


def make_data(model, batch_size, outputs):
    rng = np.random.default_rng(0)
    x = tf.constant(rng.random((batch_size, *model.input.shape[1:]), "float32"))
    y = tf.constant(rng.integers(0, outputs, batch_size))
    return measuring.repeated(x, y)


def measure(net, batch_size):
    """Seconds and CPU seconds per step, and seconds to the end of the first step, by kind."""
    models, found = {}, {}
    for kind in KINDS:
        if FLAGS.kinds and kind not in ("plain Keras", *FLAGS.kinds):
            continue
        if kind in OTHERS and FLAGS.policy != "float32":
            continue  # HGQ2 fails under mixed precision
        model, outputs = make_model(net, kind)
        data = make_data(model, batch_size, outputs)
        gc.freeze()  # otherwise garbage collection would visit the graphs of all earlier models
        start = time.perf_counter()
        model.fit(data, steps_per_epoch=1, verbose=0)
        found[kind] = {"seconds_to_first_step": time.perf_counter() - start, "wall": [], "cpu": []}
        if kind.startswith("frozen"):
            model.freeze_bits()
        models[kind] = model
    for _ in range(FLAGS.rounds):
        for kind, model in models.items():
            wall, cpu = time.perf_counter(), time.process_time()
            model.fit(data, steps_per_epoch=FLAGS.steps, verbose=0)
            found[kind]["wall"].append((time.perf_counter() - wall) / FLAGS.steps)
            found[kind]["cpu"].append((time.process_time() - cpu) / FLAGS.steps)
    table = klb.bit_table(klb.to_learned_bits(models["plain Keras"]))
    return found, sum(row.weights for row in table.rows)


def print_peak(net, batch_size, kind):
    """Trains for some steps and prints the peak memory of all tensors, in bytes."""
    model, outputs = make_model(net, kind)
    data = make_data(model, batch_size, outputs)
    fit = functools.partial(model.fit, data, steps_per_epoch=FLAGS.steps, verbose=0)
    gc.collect()
    print(measuring.peak_of_tensors(fit))


def peak(name, kind):
    """Peak memory of all tensors in a separate process that trains like this, in bytes."""
    command = [sys.executable, __file__, f"--peak_of={kind}", f"--nets={name}"]
    command += [f"--policy={FLAGS.policy}", f"--steps={FLAGS.steps}", f"--metrics={FLAGS.metrics}"]
    environment = os.environ | measuring.COUNTING
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout.split()[-1])


def summary(name, found, weights):
    plain = found["plain Keras"]
    kinds = {
        kind: {
            "seconds_per_step": min(each["wall"]),
            "ratio": min(each["wall"]) / min(plain["wall"]),
            "cpu_ratio": min(each["cpu"]) / min(plain["cpu"]),
            "seconds_to_first_step": each["seconds_to_first_step"],
            "first_step_ratio": each["seconds_to_first_step"] / plain["seconds_to_first_step"],
        }
        for kind, each in found.items()
    }
    for kind in {"plain Keras", "measured"} & set(kinds) if FLAGS.memory else ():
        kinds[kind]["peak_bytes"] = peak(name, kind)
    return {"weights": weights, "kinds": kinds}


def plot(results, path):
    """Bars of the ratios, one group per net."""
    figure, axes = plt.subplots(figsize=(10, 4.5), layout="constrained")
    kinds = [kind for kind in KINDS[1:] if any(kind in net["kinds"] for net in results.values())]
    width = 0.8 / len(kinds)
    for number, kind in enumerate(kinds):
        nets = [i for i, net in enumerate(results.values()) if kind in net["kinds"]]
        heights = [list(results.values())[i]["kinds"][kind]["ratio"] for i in nets]
        axes.bar([i - 0.4 + (number + 0.5) * width for i in nets], heights, width, label=kind)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(results)), list(results))
    axes.set(ylabel="time of a step / plain Keras", title=f"{FLAGS.policy}: cost of learned bits")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=120)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    if unknown := set(FLAGS.kinds or ()) - set(KINDS):
        raise app.UsageError(f"--kinds must be among {', '.join(KINDS)}. Received: {unknown}")
    keras.config.set_dtype_policy(FLAGS.policy)
    nets = {name: NETS[name] for name in FLAGS.nets or NETS}
    if FLAGS.peak_of:
        for net, batch_size in nets.values():
            print_peak(net, batch_size, FLAGS.peak_of)
        return
    results = {}
    for name, (net, batch_size) in nets.items():
        results[name] = summary(name, *measure(net, batch_size))
        head = (name, "step [ms]", "ratio", "of CPU", "first step [s]", "ratio", "peak [MB]")
        rows = [
            (
                kind,
                f"{1000 * row['seconds_per_step']:.1f}",
                f"{row['ratio']:.2f}",
                f"{row['cpu_ratio']:.2f}",
                f"{row['seconds_to_first_step']:.1f}",
                f"{row['first_step_ratio']:.1f}",
                f"{row['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in row else "",
            )
            for kind, row in results[name]["kinds"].items()
        ]
        print(aligned_table([[head], rows], left=1), flush=True)
    print("ratio: to plain Keras; of CPU: ratio of CPU times; peak: memory of all tensors")
    output_dir = FLAGS.output_dir or os.path.join("runs", f"overhead-{FLAGS.policy}")
    os.makedirs(output_dir, exist_ok=True)
    command = " ".join(["python", "experiments/overhead.py", *sys.argv[1:]])
    with open(os.path.join(output_dir, "overhead.json"), "w") as file:
        json.dump({"command": command, "policy": FLAGS.policy, "nets": results}, file, indent=1)
    plot(results, os.path.join(output_dir, "overhead.png"))
    print(f"Files: {output_dir}")


if __name__ == "__main__":
    app.run(main)
