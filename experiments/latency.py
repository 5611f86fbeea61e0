"""How long the exported files take to predict, beside those of the float net.

python experiments/latency.py --trained=runs/mnist-lenet/model.keras

One thread, batches of 1 and of 32, interleaved rounds in one process; the ratio is that of the
fastest rounds, since a machine's cores come and go.
"""

import json
import os
import sys
import time

import common  # noqa: F401, for its flags
import keras
import numpy as np
import onnxruntime
import tensorflow as tf
import tf2onnx
from absl import app, flags
from ai_edge_litert.interpreter import Interpreter

import keras_learnbits as klb
from keras_learnbits.tables import aligned_table

FLAGS = flags.FLAGS
flags.DEFINE_string("trained", None, "A `model.keras` that a program left.", required=True)
flags.DEFINE_integer("rounds", 30, "Rounds of each file.", lower_bound=1)

BATCHES = (1, 32)


def onnx_predictor(path, x, decode_once=False):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    if decode_once:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(path, options)
    given, *constants = session.get_inputs()
    # tf2onnx takes the constants of `Normalization` for inputs; in float files they still are.
    feed = {given.name: x} | {each.name: np.ones(each.shape, "float32") for each in constants}
    return lambda: session.run(None, feed)


def litert_predictor(path, x):
    interpreter = Interpreter(path, num_threads=1)
    (given,) = interpreter.get_input_details()
    interpreter.resize_tensor_input(given["index"], x.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(given["index"], x)
    return interpreter.invoke


def write_float_files(model, onnx_path, litert_path):
    """The files that tf2onnx and LiteRT's converter make of a Keras model."""
    specs = [tf.TensorSpec(model.input.shape, name="image")]
    predict = tf.function(lambda x: model(x, training=False), input_signature=specs)
    tf2onnx.convert.from_function(predict, specs, opset=18, output_path=onnx_path)
    converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [predict.get_concrete_function()], model
    )
    with open(litert_path, "wb") as file:
        file.write(converter.convert())


def fastest(predictors):
    """Seconds of the fastest of interleaved rounds, by name."""
    seconds = {name: [] for name in predictors}
    for _ in range(FLAGS.rounds):
        for name, predict in predictors.items():
            start = time.perf_counter()
            predict()
            seconds[name].append(time.perf_counter() - start)
    return {name: min(each) for name, each in seconds.items()}


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    model = keras.models.load_model(FLAGS.trained, compile=False)
    directory = FLAGS.output_dir or os.path.join("runs", "latency")
    os.makedirs(directory, exist_ok=True)
    paths = {
        name: os.path.join(directory, name.replace(" ", "_") + ending)
        for name, ending in {
            "float ONNX": ".onnx",
            "ONNX": ".onnx",
            "float LiteRT": ".tflite",
            "LiteRT": ".tflite",
        }.items()
    }
    plain = klb.to_keras(model, float32=True)
    write_float_files(plain, paths["float ONNX"], paths["float LiteRT"])
    klb.export_onnx(model, paths["ONNX"])
    klb.export_litert(model, paths["LiteRT"])

    milliseconds, ratios = {}, {}
    for size in BATCHES:
        x = np.random.default_rng(0).random((size, *model.input.shape[1:]), "float32")
        seconds = fastest(
            {
                "float ONNX": onnx_predictor(paths["float ONNX"], x),
                "ONNX": onnx_predictor(paths["ONNX"], x),
                "ONNX, decoded when loaded": onnx_predictor(paths["ONNX"], x, decode_once=True),
                "float LiteRT": litert_predictor(paths["float LiteRT"], x),
                "LiteRT": litert_predictor(paths["LiteRT"], x),
            }
        )
        milliseconds[size] = {name: 1000 * each for name, each in seconds.items()}
        ratios[size] = {
            name: each / seconds["float LiteRT" if "LiteRT" in name else "float ONNX"]
            for name, each in seconds.items()
        }
    result = {
        "command": " ".join(["python", "experiments/latency.py", *sys.argv[1:]]),
        "versions": {m.__name__: m.__version__ for m in (klb, keras, tf, onnxruntime)},
        "milliseconds": milliseconds,
        "ratios": ratios,
    }
    with open(os.path.join(directory, "result.json"), "w") as file:
        json.dump(result, file, indent=2)
    head = ("file", *(f"batch of {size} [ms]" for size in BATCHES), *("of float" for _ in BATCHES))
    rows = [
        (
            name,
            *(f"{milliseconds[size][name]:.2f}" for size in BATCHES),
            *(f"{ratios[size][name]:.2f}" for size in BATCHES),
        )
        for name in milliseconds[BATCHES[0]]
    ]
    print(aligned_table([[head], rows], left=1))


if __name__ == "__main__":
    app.run(main)
