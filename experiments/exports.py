"""Size and predictions of a trained model in each export format.

python experiments/exports.py --program=mnist --trained=runs/mnist-lenet/model.keras

Writes all files, runs each on the whole test set in its own runtime, and compares it with the
model: accuracy, and the largest difference of an output, both in float32.
"""

import gzip
import json
import os
import pathlib
import sys

import cifar10
import keras
import mnist
import numpy as np
import onnxruntime
import qonnx.core.onnx_exec
import tensorflow as tf
from absl import app, flags
from ai_edge_litert.interpreter import Interpreter
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.util.cleanup import cleanup_model
from qonnx.util.inference_cost import inference_cost

import keras_learnbits as klb
from keras_learnbits.tables import aligned_table

FLAGS = flags.FLAGS
flags.DEFINE_enum("program", "mnist", ["cifar10", "mnist"], "Program with the nets and data.")
flags.DEFINE_string("trained", None, "A `model.keras` that this program wrote.", required=True)

BATCH = 500


def in_onnxruntime(path, batches):
    session = onnxruntime.InferenceSession(path)
    (given,) = session.get_inputs()
    return [session.run(None, {given.name: batch})[0] for batch in batches]


def in_litert(path, batches):
    interpreter = Interpreter(path)
    (given,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.resize_tensor_input(given["index"], batches[0].shape)
    interpreter.allocate_tensors()

    def run(batch):
        interpreter.set_tensor(given["index"], batch)
        interpreter.invoke()
        return interpreter.get_tensor(result["index"])

    return [run(batch) for batch in batches]


def in_qonnx(path, batches):
    model = cleanup_model(ModelWrapper(path))
    (given,), (result,) = model.graph.input, model.graph.output

    def run(batch):
        return qonnx.core.onnx_exec.execute_onnx(model, {given.name: batch})[result.name]

    return [run(batch) for batch in batches]


def in_keras(model, batches):
    return [model(batch, training=False).numpy() for batch in batches]


def in_float32(model):
    """The model with its arithmetic in float32, as in files."""
    for layer in model.layers:
        layer.dtype_policy = "float32"
        if isinstance(layer, keras.layers.Normalization):
            layer.build(layer.input.shape)  # for its constants
    return model


def qonnx_mean_bits(path):
    cost = inference_cost(cleanup_model(ModelWrapper(path)))["total_cost"]
    return cost["total_mem_w_bits"] / cost["total_mem_w_elems"]


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    program = {"cifar10": cifar10, "mnist": mnist}[FLAGS.program]
    try:
        images, labels = program.load(FLAGS.data_dir)[1]
    except FileNotFoundError as error:
        sys.exit(str(error))
    images = (images / 255).astype("float32")
    batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
    model = in_float32(keras.models.load_model(FLAGS.trained, compile=False))
    directory = FLAGS.output_dir or os.path.join("runs", f"exports-{FLAGS.program}")
    os.makedirs(directory, exist_ok=True)
    names = {
        "float .keras": "float.keras",
        "packed": "model.safetensors",
        "packed, gzip": "model.safetensors.gz",
        "LiteRT, gzip": "model.tflite.gz",
        "ONNX": "model.onnx",
        "QONNX": "model.qonnx.onnx",
        "LiteRT": "model.tflite",
        "LiteRT int8": "model-int8.tflite",
    }
    paths = {name: os.path.join(directory, file) for name, file in names.items()}

    plain = klb.to_keras(model)
    plain.save(paths["float .keras"])
    klb.save_packed(model, paths["packed"])
    klb.export_onnx(model, paths["ONNX"])
    signature = tf.TensorSpec(batches[0].shape, name="image")
    klb.export_qonnx(model, paths["QONNX"], input_signature=signature)
    klb.export_litert(model, paths["LiteRT"])
    print(klb.export_litert(model, paths["LiteRT int8"], arithmetic="int8"))
    for name in ("packed", "LiteRT"):
        with gzip.open(paths[f"{name}, gzip"], "wb") as file:
            file.write(pathlib.Path(paths[name]).read_bytes())
    filled = in_float32(keras.models.load_model(FLAGS.trained, compile=False))
    for variable in filled.weights:
        variable.assign(np.zeros(variable.shape) + ("bits" in variable.name))
    klb.load_packed(paths["packed"], into=filled)

    expected = np.concatenate(in_keras(model, batches))
    predicted = {
        "float .keras": in_keras(keras.models.load_model(paths["float .keras"]), batches),
        "packed": in_keras(filled, batches),
        "ONNX": in_onnxruntime(paths["ONNX"], batches),
        "QONNX": in_qonnx(paths["QONNX"], batches),
        "LiteRT": in_litert(paths["LiteRT"], batches),
        "LiteRT int8": in_litert(paths["LiteRT int8"], batches),
    }
    predicted = {name: np.concatenate(outputs) for name, outputs in predicted.items()}

    def accuracy(outputs):
        return float(np.mean(outputs.argmax(axis=-1) == labels))

    table = klb.bit_table(model)
    result = {
        "command": " ".join(["python", "experiments/exports.py", *sys.argv[1:]]),
        "versions": {
            module.__name__: module.__version__ for module in (klb, keras, tf, onnxruntime)
        },
        "bits": {row.layer: row.bits for row in table.rows},
        "mean_bits": table.mean_bits,
        "mean_bits_in_qonnx": qonnx_mean_bits(paths["QONNX"]),
        "bytes": {name: os.path.getsize(path) for name, path in paths.items()},
        "bytes_of_bit_table": table.packed_bytes,
        "float_bytes_of_bit_table": table.float_bytes,
        "test_accuracy": {"model": accuracy(expected)}
        | {name: accuracy(outputs) for name, outputs in predicted.items()},
        "largest_output": float(np.abs(expected).max()),
        "largest_difference": {
            name: float(np.abs(outputs - expected).max()) for name, outputs in predicted.items()
        },
    }
    with open(os.path.join(directory, "result.json"), "w") as file:
        json.dump(result, file, indent=2)
    head = ("file", "bytes", "of float", "test accuracy", "largest difference")
    rows = [
        (
            name,
            f"{size:,}",
            f"{size / result['bytes']['float .keras']:.1%}",
            f"{result['test_accuracy'][name]:.2%}" if name in predicted else "",
            f"{result['largest_difference'][name]:.1e}" if name in predicted else "",
        )
        for name, size in result["bytes"].items()
    ]
    print(aligned_table([[head], rows], left=1))
    print(
        "of float: of the bytes of the float .keras file; largest difference: to the model's output"
    )
    print(
        f"model: {result['test_accuracy']['model']:.2%}, {table.packed_bytes:,} bytes in the bit "
        f"table, outputs up to {result['largest_output']:.1f}\n"
        f"mean bits {table.mean_bits:.4f}, in QONNX {result['mean_bits_in_qonnx']:.4f}"
    )


if __name__ == "__main__":
    app.run(main)
