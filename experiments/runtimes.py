"""LiteRT, onnxruntime and OpenVINO: makes, loads and calls their files.

Each class converts a float model as the runtime's documentation describes, and quantizes it with
the runtime's tools.
"""

import contextlib
import functools
import os
import pathlib
import tempfile

import keras
import numpy as np
import onnxruntime
import tensorflow as tf
import tf2onnx
from ai_edge_litert.interpreter import Interpreter
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

import keras_learnbits as klb

# Number of batches of random inputs on which the runtimes' conversions are calibrated.
CALIBRATION = 8


def without_constants(layer):
    """A copy of a layer; `Rescaling` replaces `Normalization`."""
    if not isinstance(layer, keras.layers.Normalization):
        return layer.__class__.from_config(layer.get_config())
    mean, deviation = np.array(layer.input_mean), np.sqrt(layer.input_variance)
    return keras.layers.Rescaling(1 / deviation, -mean / deviation, name=layer.name)


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
        found = interpreter.get_output_details()[0]

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
    """onnxruntime with default options and one thread."""

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
    def convert(net, path):
        """Writes a float model with tf2onnx, with its weights as constants."""
        specs = [tf.TensorSpec(net.input.shape, name="image")]
        weights = [(v, v.numpy()) for v in net.weights]

        def frozen(x):
            with keras.StatelessScope(weights, initialize_variables=False):
                return net(x, training=False)

        function = tf.function(frozen, input_signature=specs)
        tf2onnx.convert.from_function(function, specs, opset=18, output_path=path)

    @staticmethod
    def quantize(net, path, batches):
        """Writes onnxruntime's static 8-bit quantization of a float model.

        Args:
            net: Keras model with one input.
            path: Path of the file.
            batches: Iterable of arrays to calibrate on.
        """
        OnnxRuntime.convert(net, path)
        path = os.path.abspath(path)
        # It writes temporary files to the working directory.
        with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
            quant_pre_process(path, path, skip_symbolic_shape=True)

        class Reader(CalibrationDataReader):
            left = iter(batches)

            def get_next(self):
                batch = next(self.left, None)
                return None if batch is None else {"image": batch}

        quantize_static(
            path,
            path,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )

    @staticmethod
    def files(learned, with_activations, plain):
        batches = (inputs_of(plain, 1, seed) for seed in range(CALIBRATION))
        return {
            "float": functools.partial(OnnxRuntime.convert, plain),
            "own static int8": functools.partial(OnnxRuntime.quantize, plain, batches=batches),
            'arithmetic="float"': functools.partial(klb.export_onnx, learned),
            'arithmetic="int8", activations=True': functools.partial(
                klb.export_onnx, with_activations, arithmetic="int8"
            ),
        }


class OpenVino(OnnxRuntime):
    """OpenVINO with the files of onnxruntime, without 2-bit integers, which it cannot read."""

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
