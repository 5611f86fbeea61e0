"""The files of a quantized model, in each format."""

import contextlib
import os
import sys

from keras_learnbits.command_line.picture import draw_bits
from keras_learnbits.export.fixed_point import to_fixed_point
from keras_learnbits.export.litert import export_litert
from keras_learnbits.export.onnx import export_onnx
from keras_learnbits.export.packed.saving import save_packed

PACKED = "model.safetensors"
# What each file is for, in the order in which they are written.
PURPOSES = {
    "model.keras": "Keras, to evaluate and train on: float weights and the optimizer's state",
    PACKED: "the packed file: weights at the bit-width of each layer; read by load_packed or NumPy",
    "model.tflite": "LiteRT (TensorFlow Lite), in 8-bit arithmetic",
    "model.onnx": "onnxruntime and other runtimes",
    "circuit.keras": "hls4ml and alkaid: plain Keras layers and fixed-point activations",
    "bits.png": "a picture of the bit-widths",
}
REPORTS = ("report.json", "report.html")
NAMES = {*PURPOSES, *REPORTS}


def write_model(folder, model, integers, circuit=False):
    """Writes a quantized model in all formats.

    `model.keras` and the packed file are always written. Another file is skipped if a package is
    missing or if its format cannot hold the model.

    Args:
        folder: Path of the folder.
        model: The quantized model.
        integers: Whether `model.onnx` computes in integers, for quantized layer inputs.
        circuit: Whether to write `circuit.keras`, for steps that are powers of two.

    Returns:
        Pair of dictionaries: of file names to bytes, and of the names of skipped files to reasons.

    Raises:
        ValueError: The packed file cannot hold the model.
        OSError: A file cannot be written.
    """

    def path(name):
        return os.path.join(folder, name)

    arithmetic = "int8" if integers else "float"
    model.save(path("model.keras"))
    save_packed(model, path(PACKED))
    optional = {
        "model.tflite": lambda to: export_litert(model, to, arithmetic="int8"),
        "model.onnx": lambda to: export_onnx(model, to, arithmetic=arithmetic),
        "bits.png": lambda to: draw_bits(model, to),
    }
    if circuit:
        optional["circuit.keras"] = lambda to: to_fixed_point(model).save(to)
    skipped = {}
    for name, write in optional.items():
        reason = _reason_to_skip(write, path(name))
        if reason is not None:
            skipped[name] = reason
    made = ["model.keras", PACKED, *(name for name in optional if name not in skipped)]
    written = {name: os.path.getsize(path(name)) for name in PURPOSES if name in made}
    return written, skipped


def _reason_to_skip(write, path):
    """Writes a file; the reason if that fails, otherwise None."""
    try:
        # Converters print to stdout, which is for the result.
        with contextlib.redirect_stdout(sys.stderr):
            write(path)
    except OSError:  # such as a full disk, which concerns all files
        raise
    except Exception as error:  # converters raise custom classes; the other files are kept
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
        kind = "" if isinstance(error, ImportError | ValueError) else f"{type(error).__name__}: "
        return kind + " ".join(str(error).split())
    return None
