"""How long exported files take to predict, compared with the float files of the same nets.

python experiments/latency.py
python experiments/latency.py --of=LeNet --output_dir=runs/latency

Nets of random weights at mean widths of about 3 bits; kernels have 1 to 7 bits in turn. Each float
file is converted as its runtime's documentation says: LiteRT by `TFLiteConverter.from_keras_model`,
ONNX by tf2onnx. The lines to beat are each runtime's own 8-bit conversions of the float net:
LiteRT's dynamic range and full integer, onnxruntime's static quantization. One thread; batches of
1 and of 32; all files take turns in one process, and the fastest call counts. Ratios are those to
the float file of the same runtime in the same run.

OpenVINO runs the ONNX files where it is installed (`pip install openvino`).
"""

import contextlib
import functools
import importlib.util
import json
import os
import pathlib
import sys
import tempfile
import time

import cifar10
import common  # noqa: F401, for its flags
import keras
import mnist
import numpy as np
import onnxruntime
import overhead
import tensorflow as tf
import tf2onnx
from absl import app, flags
from ai_edge_litert.interpreter import Interpreter
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

import keras_learnbits as klb
from keras_learnbits.tables import aligned_table

FLAGS = flags.FLAGS
flags.DEFINE_list("of", None, "Names of nets; all by default.")
flags.DEFINE_integer("calls", 60, "Calls of each file.", lower_bound=1)

L = keras.layers


def transformer():
    """Two encoder blocks of width 128 over 64 positions, with ReLU: tf2onnx lacks exact GELU."""
    x = inputs = keras.Input((64, 128))
    for _ in range(2):
        y = L.LayerNormalization()(x)
        x = L.Add()([x, L.MultiHeadAttention(4, 32)(y, y)])
        y = L.Dense(512, activation="relu")(L.LayerNormalization()(x))
        x = L.Add()([x, L.Dense(128)(y)])
    return inputs, L.Dense(10)(L.GlobalAveragePooling1D()(x))


BATCHES = (1, 32)
WIDTHS = (1, 2, 3, 4, 5, 2, 3)
# Batches of random inputs that the runtimes' own conversions are calibrated on.
CALIBRATION = 8
NETS = {
    "LeNet": lambda: mnist.lenet(L.Conv2D, L.Dense),
    "CIFAR-10 net": lambda: cifar10.cnn(L.Conv2D, L.Dense),
    "MobileNetV2": overhead.mobilenet,
    "ResNet-20": lambda: cifar10.resnet20(L.Conv2D, L.Dense),
    "dense net": overhead.dense_net,
    "transformer": transformer,
}


def make_nets(name):
    """A net with random weights and statistics, converted: without and with activations.

    Kernels have 1 to 5 bits, activations 8.
    """
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    # tf2onnx takes the constants of `Normalization` for inputs.
    net = keras.models.clone_model(keras.Model(*NETS[name]()), clone_function=without_constants)
    for layer in net.layers:
        if isinstance(layer, L.BatchNormalization):
            layer.gamma.assign(rng.uniform(0.5, 1.5, layer.gamma.shape))
            layer.beta.assign(rng.normal(0, 0.1, layer.beta.shape))
            layer.moving_mean.assign(rng.normal(0, 0.1, layer.beta.shape))
            layer.moving_variance.assign(rng.uniform(0.5, 1.5, layer.beta.shape))
    learned = klb.to_learned_bits(net), klb.to_learned_bits(net, activations=True)
    for model in learned:
        kernels = [t for t in model.quantized_tensors if hasattr(t, "kernel")]
        for number, kernel in enumerate(kernels):
            kernel.bits.assign(WIDTHS[number % len(WIDTHS)])
            kernel.fit_scale()
    for seed in range(CALIBRATION):
        learned[1](inputs_of(net, 16, seed), training=True)
    return learned


def without_constants(layer):
    """A copy of a layer, with `Rescaling` in place of `Normalization`."""
    if not isinstance(layer, L.Normalization):
        return layer.__class__.from_config(layer.get_config())
    mean, deviation = np.array(layer.input_mean), np.sqrt(layer.input_variance)
    return L.Rescaling(1 / deviation, -mean / deviation, name=layer.name)


def inputs_of(model, size, seed=0):
    return np.random.default_rng(seed).random((size, *model.input.shape[1:]), "float32")


class LiteRT:
    """LiteRT's interpreter with XNNPACK, its default."""

    ending = ".tflite"

    @staticmethod
    def load(path, x):
        interpreter = Interpreter(path, num_threads=1)
        (given,) = interpreter.get_input_details()
        interpreter.resize_tensor_input(given["index"], x.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(given["index"], x)
        (found,) = interpreter.get_output_details()

        def predict():
            interpreter.invoke()
            return interpreter.get_tensor(found["index"])

        return predict

    @staticmethod
    def files(learned, with_activations, plain):
        """Dictionary of the name of a file to a function that writes it to a path."""

        def convert(path, optimize=False, calibrate=False):
            converter = tf.lite.TFLiteConverter.from_keras_model(plain)
            if optimize:
                converter.optimizations = [tf.lite.Optimize.DEFAULT]
            if calibrate:
                converter.representative_dataset = lambda: (
                    [inputs_of(plain, 1, seed)] for seed in range(CALIBRATION)
                )
                converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
            pathlib.Path(path).write_bytes(converter.convert())

        return {
            "float": convert,
            "own dynamic range": functools.partial(convert, optimize=True),
            "own full integer": functools.partial(convert, optimize=True, calibrate=True),
            'arithmetic="float"': functools.partial(klb.export_litert, learned),
            'arithmetic="int8"': functools.partial(klb.export_litert, learned, arithmetic="int8"),
            'arithmetic="int8", activations=True': functools.partial(
                klb.export_litert, with_activations, arithmetic="int8"
            ),
        }


class OnnxRuntime:
    """onnxruntime with a session's default options, and one thread."""

    ending = ".onnx"

    @staticmethod
    def load(path, x):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        (given,) = session.get_inputs()
        return lambda: session.run(None, {given.name: x})[0]

    @staticmethod
    def files(learned, with_activations, plain):
        def convert(path):
            specs = [tf.TensorSpec(plain.input.shape, name="image")]
            weights = [(v, v.numpy()) for v in plain.weights]

            def frozen(x):
                with keras.StatelessScope(weights, initialize_variables=False):
                    return plain(x, training=False)

            function = tf.function(frozen, input_signature=specs)
            tf2onnx.convert.from_function(function, specs, opset=18, output_path=path)

        def quantize(path):
            convert(path)
            path = os.path.abspath(path)
            # It leaves files in the working directory.
            with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
                quant_pre_process(path, path, skip_symbolic_shape=True)

            class Reader(CalibrationDataReader):
                batches = iter(range(CALIBRATION))

                def get_next(self):
                    seed = next(self.batches, None)
                    return None if seed is None else {"image": inputs_of(plain, 1, seed)}

            quantize_static(
                path,
                path,
                Reader(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )

        return {
            "float": convert,
            "own static int8": quantize,
            'arithmetic="float"': functools.partial(klb.export_onnx, learned),
            'arithmetic="int8", activations=True': functools.partial(
                klb.export_onnx, with_activations, arithmetic="int8"
            ),
        }


class OpenVino(OnnxRuntime):
    """OpenVINO, of the same files, but for 2-bit integers, which it does not read."""

    @staticmethod
    def load(path, x):
        import openvino

        compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": 1})
        return lambda: compiled([x])[0]

    @staticmethod
    def files(learned, with_activations, plain):
        written = OnnxRuntime.files(learned, with_activations, plain)
        del written["own static int8"]
        written['arithmetic="float"'] = functools.partial(klb.export_onnx, learned, opset=21)
        return written


RUNTIMES = {"LiteRT": LiteRT, "onnxruntime": OnnxRuntime, "OpenVINO": OpenVino}


def fastest(predictors):
    """Seconds of the fastest of interleaved calls, by name."""
    seconds = dict.fromkeys(predictors, np.inf)
    for predict in predictors.values():
        predict()
    for _ in range(FLAGS.calls):
        for name, predict in predictors.items():
            start = time.perf_counter()
            predict()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def measure(name, directory):
    """Milliseconds and bytes of each file of a net: a list of dictionaries."""
    learned, with_activations = make_nets(name)
    plain = klb.to_keras(learned)
    rows, predictors = [], {size: {} for size in BATCHES}
    for runtime, kind in RUNTIMES.items():
        if runtime == "OpenVINO" and not importlib.util.find_spec("openvino"):
            continue
        for file, write in kind.files(learned, with_activations, plain).items():
            slug = "".join(c if c.isalnum() else "_" for c in f"{name} {runtime} {file}")
            path = os.path.join(directory, slug + kind.ending)
            try:
                write(path)
                for size in BATCHES:
                    predictors[size][runtime, file] = kind.load(path, inputs_of(plain, size))
            except Exception as error:  # a runtime's own conversion may not take a net
                print(f"{name}, {runtime}, {file}: {type(error).__name__}: {str(error)[:200]}")
                for size in BATCHES:
                    predictors[size].pop((runtime, file), None)
                continue
            rows.append(
                {
                    "net": name,
                    "runtime": runtime,
                    "file": file,
                    "bytes": os.path.getsize(path),
                    "milliseconds": {},
                    "ratio": {},
                    "difference": _difference(
                        predictors[BATCHES[0]][runtime, file],
                        with_activations if file.endswith("activations=True") else learned,
                    )
                    if file.startswith("arithmetic")
                    else None,
                }
            )
    for size in BATCHES:
        seconds = fastest(predictors[size])
        for row in rows:
            taken = seconds[row["runtime"], row["file"]]
            row["milliseconds"][size] = 1000 * taken
            row["ratio"][size] = taken / seconds[row["runtime"], "float"]
    return rows


def _difference(predict, model):
    """The largest difference of a file's outputs from its model's, per largest output."""
    expected = model.predict(inputs_of(model, BATCHES[0]), verbose=0)
    return float(np.abs(predict() - expected).max() / np.abs(expected).max())


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    directory = FLAGS.output_dir or os.path.join("runs", "latency")
    os.makedirs(directory, exist_ok=True)
    rows = []
    for name in FLAGS.of or NETS:
        rows += measure(name, directory)
        result = {
            "command": " ".join(["python", "experiments/latency.py", *sys.argv[1:]]),
            "versions": {m.__name__: m.__version__ for m in (klb, keras, tf, onnxruntime)},
            "rows": rows,
        }
        with open(os.path.join(directory, "result.json"), "w") as file:
            json.dump(result, file, indent=1)
    head = ("net", "runtime", "file", "bytes", "of float",
            *(f"batch {size} [ms]" for size in BATCHES),
            *(f"of float, batch {size}" for size in BATCHES), "difference")  # fmt: skip
    floats = {(r["net"], r["runtime"]): r["bytes"] for r in rows if r["file"] == "float"}
    body = [
        (r["net"], r["runtime"], r["file"], f"{r['bytes']:,}",
         f"{r['bytes'] / floats[r['net'], r['runtime']]:.1%}",
         *(f"{r['milliseconds'][size]:.2f}" for size in BATCHES),
         *(f"{r['ratio'][size]:.2f}" for size in BATCHES),
         "" if r["difference"] is None else f"{r['difference']:.1e}")
        for r in rows
    ]  # fmt: skip
    print(aligned_table([[head], body], left=3))


if __name__ == "__main__":
    app.run(main)
