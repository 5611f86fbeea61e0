"""Post-training quantization: accuracy against size from unlabelled images.

TFDS_DATA_DIR=... python experiments/post_training.py --nets=cnn_quarter --output_dir=runs/post

A float model is trained on all but the last 5,000 training images (`<output_dir>/<net>/model.keras`
is made by the net's program if it is missing), and quantized from `--examples` of those images,
without labels. Each of `--seeds` is a separate sample. Every result is written to a file at once
and is not computed again, so the program may be stopped and called again.

Methods: `quantize`; `steps=0`, the same without training; `nearest`, the same width in every layer,
rounded to nearest with fitted scales; `litert` and `onnxruntime`, these runtimes' 8-bit
post-training quantization of the float model from the same images, run in these runtimes; and
`without_<part>`, `quantize` without one of its parts (`PARTS`; `channel_steps` needs
`--power_of_two`). `drop` quantizes to the smallest model whose accuracy on the held-out images
falls by at most one point.
`--evaluate=held_out` evaluates on the 5,000 held-out images, to choose settings; `test` evaluates
on the test set, once settings are chosen.
"""

import contextlib
import gzip
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import unittest.mock

import common
import keras
import numpy as np
import tensorflow as tf
from absl import app, flags
from loading import load_tfds
from runtimes import LiteRT, OnnxRuntime, without_constants

import keras_learnbits as klb
from keras_learnbits.tables import aligned_table

FLAGS = flags.FLAGS
flags.DEFINE_list(
    "nets", ["lenet", "cnn_quarter", "depthwise", "resnet20", "cnn"], "Names of nets."
)
flags.DEFINE_list("methods", ["quantize", "steps=0", "nearest"], "Methods to compare.")
flags.DEFINE_list("budgets", ["4", "3", "2"], "Mean bits per weight.")
flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of the sample of images and of training.")
flags.DEFINE_integer("examples", 1024, "Number of unlabelled images.", lower_bound=8)
flags.DEFINE_string("images", None, "Other source of images: `noise`, or a data set's name.")
flags.DEFINE_integer("settling_steps", None, "Training steps of `quantize`.")
flags.DEFINE_bool("activations", False, "Also quantize activations, to 8 bits.")
flags.DEFINE_bool("power_of_two", False, "Use power-of-two steps, with batch norms folded.")
flags.DEFINE_enum("evaluate", "test", ["test", "held_out"], "Images to evaluate on.")

# Parts that can be left out of `quantize`: names in the package, and their replacements.
PACKAGE = "keras_learnbits"
PARTS = {
    "compensation": {
        f"{PACKAGE}.quantization.quantize.round_in_order": lambda model, examples: None,
        f"{PACKAGE}.calibration.measuring.kernel_roundings": lambda model, examples: {},
    },
    "layer_inputs": {
        f"{PACKAGE}.quantization.settling._relative_difference": lambda a, b: tf.zeros(()),
    },
    "variation": {f"{PACKAGE}.quantization.settling.varied": lambda batch, seed: batch},
    "reach": {f"{PACKAGE}.quantization.settling.REACH": 1e6},
    "statistics": {
        f"{PACKAGE}.quantization.quantize.estimate_batch_norm": lambda model, data: None,
    },
}
# With --power_of_two: one step per layer instead of one per channel.
PARTS["channel_steps"] = {
    f"{PACKAGE}.conversion.to_learned_bits._power_of_two_quantizer": (
        lambda quantizer: klb.LearnedScaleQuantizer(per_channel=False, power_of_two=True)
    )
}
PROGRAMS = {"lenet": "mnist"}
EPOCHS = {"lenet": 6, "cnn_quarter": 14, "depthwise": 10, "resnet20": 100, "cnn": 6}
HELD_OUT = 5000


def program_of(net):
    return PROGRAMS.get(net, "cifar10")


def float_net(net, directory):
    """A float32 model, which is trained if there is no file of it."""
    path = os.path.join(directory, net, "model.keras")
    if not os.path.exists(path):
        train, _ = load_tfds(program_of(net), FLAGS.data_dir)
        program = os.path.join(os.path.dirname(__file__), f"{program_of(net)}.py")
        command = [sys.executable, program, "--float", f"--model={net}", "--resume",
                   f"--epochs={EPOCHS[net]}", f"--train_examples={len(train[0]) - HELD_OUT}",
                   f"--output_dir={os.path.dirname(path)}"]  # fmt: skip
        subprocess.run(command, check=True)
    trained = keras.models.load_model(path)
    keras.config.set_dtype_policy("float32")
    FLAGS.model, FLAGS.dtype_policy = net, "float32"
    problem = importlib.import_module(program_of(net)).PROBLEM
    model = common.build(problem, common.RECIPES["measured"](), learned=False)
    model.set_weights(trained.get_weights())
    return model


def images_for(net, seed):
    """Unlabelled images: of the net's training set, of another data set, or noise."""
    rng = np.random.default_rng(seed)
    (x, _), _ = load_tfds(program_of(net), FLAGS.data_dir)
    if FLAGS.images == "noise":
        return rng.random((FLAGS.examples, *x.shape[1:]), "float32")
    if FLAGS.images:
        shape = x.shape[1:]
        (x, _), _ = load_tfds(FLAGS.images, FLAGS.data_dir)
        x = fitted(x[: 4 * FLAGS.examples], shape)
    else:
        x = x[:-HELD_OUT]
    return x[rng.choice(len(x), FLAGS.examples, replace=False)].astype("float32") / 255


def fitted(images, shape):
    """Images of another data set, with the size and number of channels of a net's input."""
    images = tf.image.resize(images, shape[:2]).numpy()
    grey = images.mean(axis=-1, keepdims=True)
    return np.broadcast_to(images if images.shape[-1] == shape[-1] else grey, (len(images), *shape))


def images_and_labels(net, which):
    """The test set, or the held-out training examples."""
    train, test = load_tfds(program_of(net), FLAGS.data_dir)
    if which == "held_out":
        test = tuple(array[-HELD_OUT:] for array in train)
    return test[0].astype("float32") / 255, test[1]


def accuracy(predict, x, y):
    """Share of correct classes, from a function of a batch to outputs."""
    hits = [
        predict(x[i : i + 500]).argmax(axis=-1) == y[i : i + 500] for i in range(0, len(x), 500)
    ]
    return float(np.concatenate(hits).mean())


def in_inference(model):
    function = tf.function(lambda x: model(x, training=False), reduce_retracing=True)
    return lambda x: function(tf.constant(x)).numpy()


def uniform(net, bits):
    """The same width in every layer, rounded to nearest with fitted scales."""
    model = klb.to_learned_bits(net)
    for kernel in model.quantized_tensors:
        kernel.bits.assign(bits)
        kernel.fit_scale()
    return model


def in_litert(net, images, path):
    """LiteRT's full-integer post-training quantization, as documented."""
    converter = tf.lite.TFLiteConverter.from_keras_model(net)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([image[None]] for image in images)
    with open(path, "wb") as file:
        file.write(converter.convert())
    return lambda x: LiteRT.load(path, x)()


def in_onnxruntime(net, images, path):
    """The static post-training quantization of onnxruntime, as documented."""
    plain = keras.models.clone_model(net, clone_function=without_constants)
    weights = {layer.name: layer.get_weights() for layer in net.layers}
    for layer in plain.layers:
        if layer.weights:
            layer.set_weights(weights[layer.name])
    OnnxRuntime.quantize(plain, path, [image[None] for image in images])
    return lambda x: OnnxRuntime.load(path, x)()


@contextlib.contextmanager
def without(part):
    """A scope in which `quantize` lacks one of its `PARTS`; other names have no effect."""
    with contextlib.ExitStack() as stack:
        for name, replacement in PARTS.get(part, {}).items():
            stack.enter_context(unittest.mock.patch(name, replacement))
        yield


def run(net, model, method, bits, seed):
    """One result, a dictionary."""
    images = images_for(net, seed)
    start = time.perf_counter()
    result = {}
    with tempfile.TemporaryDirectory() as directory:
        if method in ("litert", "onnxruntime"):
            path = os.path.join(directory, "model")
            make = {"litert": in_litert, "onnxruntime": in_onnxruntime}[method]
            predict = make(model, images, path)
            result |= {"bytes": os.path.getsize(path), "mean_bits": 8.0}
        else:
            if method == "nearest":
                small = uniform(model, float(bits))
            else:
                target = {} if method == "drop" else {"target_bits": float(bits)}
                if method == "drop":
                    held_out = images_and_labels(net, "held_out")
                    target = {"max_accuracy_drop": 0.01, "validation_data": held_out}
                with without(method.removeprefix("without_")):
                    small = klb.quantize(
                        model,
                        images,
                        **target,
                        activations=FLAGS.activations,
                        power_of_two=FLAGS.power_of_two,
                        steps=0 if method == "steps=0" else FLAGS.settling_steps,
                        seed=seed,
                        verbose=0,
                    )
                result["report"] = small.quantization.to_dict()
            table = klb.bit_table(small)
            result |= {
                "bytes": table.packed_bytes,
                "mean_bits": table.mean_bits,
                "bits": [row.bits for row in table.rows],
            }
            predict = in_inference(small)
        result["seconds"] = round(time.perf_counter() - start, 1)
        result["accuracy"] = accuracy(predict, *images_and_labels(net, FLAGS.evaluate))
        if method == "litert":
            result["litert"] = litert_file(net, path)
        elif method == "quantize":
            path = os.path.join(directory, "model.tflite")
            klb.export_litert(small, path, arithmetic="int8")
            result["litert"] = litert_file(net, path)
    return result


def float_result(net, model):
    """Accuracy and sizes of the float model."""
    data = images_and_labels(net, FLAGS.evaluate)
    result = {"accuracy": accuracy(in_inference(model), *data), "bytes": 4 * model.count_params()}
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "model.tflite")
        with open(path, "wb") as file:
            file.write(tf.lite.TFLiteConverter.from_keras_model(model).convert())
        return result | {"litert": litert_file(net, path)}


def litert_file(net, path):
    """Accuracy of a LiteRT file, its bytes, and its bytes compressed as in an app's package."""
    with open(path, "rb") as file:
        content = file.read()
    data = images_and_labels(net, FLAGS.evaluate)
    return {
        "accuracy": accuracy(lambda x: LiteRT.load(path, x)(), *data),
        "bytes": len(content),
        "gzip_bytes": len(gzip.compress(content)),
    }


def key_of(net, method, bits, seed):
    parts = [net, method, bits, seed, FLAGS.examples]
    parts += [FLAGS.images] if FLAGS.images else []
    parts += (
        [f"steps{FLAGS.settling_steps}"]
        if FLAGS.settling_steps is not None and method == "quantize"
        else []
    )
    parts += ["activations"] if FLAGS.activations else []
    parts += ["powers"] if FLAGS.power_of_two else []
    return "-".join(map(str, [*parts, FLAGS.evaluate]))


def load(path):
    if not os.path.exists(path):
        return {}
    with open(path) as file:
        return json.load(file)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    directory = FLAGS.output_dir or os.path.join("runs", "post")
    path = os.path.join(directory, "results.json")
    for net in FLAGS.nets:
        model = float_net(net, directory)
        results = load(path)
        key = f"{net}-float-{FLAGS.evaluate}"
        if key not in results:
            results[key] = float_result(net, model)
        for method in FLAGS.methods:
            budgets = {"litert": ["8"], "onnxruntime": ["8"], "drop": ["any"]}
            for bits in budgets.get(method, FLAGS.budgets):
                for seed in FLAGS.seeds[:1] if method == "nearest" else FLAGS.seeds:
                    name = key_of(net, method, bits, seed)
                    if name in results:
                        continue
                    found = run(net, model, method, bits, int(seed))
                    results = load(path) | {key: results[key], name: found}
                    gap = 100 * (results[key]["accuracy"] - found["accuracy"])
                    print(f"{name}: gap {gap:.2f}, {found['seconds']} s", flush=True)
                    with open(f"{path}.new", "w") as file:
                        json.dump(results, file, indent=1)
                    os.replace(f"{path}.new", path)
    print(summary(load(path)))


def summary(results):
    """Table of the losses of accuracy against float, in points: mean and range over seeds."""
    floats = {name: each for name, each in results.items() if "-float-" in name}
    groups = {}
    for name, each in results.items():
        if name not in floats:
            net, method, bits, _, *rest = name.split("-")
            groups.setdefault((net, method, bits, "-".join(rest)), []).append(each)
    body = []
    for (net, method, bits, rest), runs in groups.items():
        base = floats[f"{net}-float-{rest.rpartition('-')[2]}"]
        gaps = [100 * (base["accuracy"] - each["accuracy"]) for each in runs]
        size = np.mean([each["bytes"] for each in runs])
        body.append(
            (net, method, bits, rest, str(len(runs)), f"{100 * base['accuracy']:.2f}",
             f"{np.mean(gaps):+.2f}", f"{min(gaps):+.2f} to {max(gaps):+.2f}", f"{size:,.0f}",
             f"{np.mean([each['seconds'] for each in runs]):.0f}")
        )  # fmt: skip
    head = ("net", "method", "bits", "images", "seeds", "float [%]", "gap [points]", "range",
            "bytes", "seconds")  # fmt: skip
    return aligned_table([[head], body], left=4) + (
        "\ngap: accuracy of float minus that of the method; images: number, source, evaluation"
    )


if __name__ == "__main__":
    app.run(main)
