"""The arguments of the command line. Imports neither TensorFlow nor Keras."""

import argparse
import sys

from keras_learnbits._version import __version__

PROGRAM = "keras_learnbits"

QUANTIZE = """\
Quantizes a trained Keras model to a bit-width per layer, from example inputs without labels.

Give one target: --target_bits, --target_bytes, --target_compression, --target_bit_operations, or
--max_accuracy_drop with --labels. The folder --output_dir then holds model.keras, model.safetensors
(the packed file), model.tflite, model.onnx, bits.png, report.json and report.html; with
--power_of_two also circuit.keras.
"""

DATA = """\
example inputs with the values that the model was trained on: a .npy file; an .npz file of one
array, or of arrays named as the model's inputs; or a folder of images, which are resized to the
model's input size and have values 0..255. A few hundred to a few thousand examples are enough
"""


class OneLineParser(argparse.ArgumentParser):
    """A parser that reports an error as one line, without the usage."""

    def error(self, message):
        """Exits with code 2 and a message."""
        print(f"{self.prog}: error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)


def integer(text):
    """The integer that an argument gives, also in a notation such as `1e5`.

    Raises:
        ValueError: It is not an integer; argparse names this function in the message.
    """
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():
            raise
        return int(number)


def make_parser():
    """The parser of the whole command line.

    Returns:
        `argparse.ArgumentParser`; parsed arguments have an attribute `run`, a function of them.
    """
    parser = OneLineParser(
        prog=PROGRAM, description="Quantizes Keras models to a bit-width per layer."
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_quantize(commands)
    _add_show(commands)
    return parser


def _add_quantize(commands):
    command = commands.add_parser(
        "quantize",
        help="quantize a model, and write it in all formats with a report",
        description=QUANTIZE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=_quantize)
    command.add_argument("model", help="a model that Keras saved, .keras or .h5")
    command.add_argument("--data", required=True, help=DATA)
    command.add_argument("--output_dir", required=True, help="the folder to write")
    command.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the folder if an earlier run wrote it",
    )
    _add_targets(command.add_argument_group("target, exactly one").add_mutually_exclusive_group())
    _add_labels(command.add_argument_group("accuracy"))
    _add_settings(command.add_argument_group("settings"))


def _add_targets(group):
    group.required = True
    group.add_argument("--target_bits", type=float, help="largest mean bits per weight")
    group.add_argument(
        "--target_bytes", type=integer, help="largest size of the packed model in bytes"
    )
    group.add_argument(
        "--target_compression", type=float, help="smallest ratio of float bytes to packed bytes"
    )
    group.add_argument(
        "--target_bit_operations",
        type=float,
        help="largest number of bit operations for one example: multiply-accumulates times bits of "
        "weights times bits of inputs; needs --activations or --power_of_two, and also chooses the "
        "bits of layer inputs",
    )
    group.add_argument(
        "--max_accuracy_drop",
        type=float,
        help="find the smallest model whose accuracy is lower by at most this, such as 0.01; "
        "needs --labels and takes about five times as long",
    )


def _add_labels(group):
    group.add_argument(
        "--labels",
        help="a .npy file of class numbers or one-hot rows, to measure accuracy: for the examples "
        "of --validation_data, or else for those of --data. In that case one half of --data, "
        "drawn at random, calibrates the model, and the other half measures its accuracy, so that "
        "no example does both. Images of a folder are in the order of their sorted paths. Do not "
        "use the test set with --max_accuracy_drop",
    )
    group.add_argument(
        "--validation_data", help="inputs that --labels belong to, in the same formats as --data"
    )


def _add_settings(group):
    group.add_argument(
        "--activations",
        action="store_true",
        help="also quantize layer inputs to 8 bits, and write model.onnx and model.tflite for "
        "integer arithmetic throughout",
    )
    group.add_argument(
        "--power_of_two",
        action="store_true",
        help="use steps that are powers of two, for circuits; also quantizes layer inputs, like "
        "--activations, and writes circuit.keras for hls4ml and alkaid",
    )
    group.add_argument(
        "--scale",
        type=float,
        help="multiply all inputs by this, such as 0.00392 for images of values 0..1; not for "
        "models that take integers",
    )
    group.add_argument(
        "--include",
        action="append",
        metavar="PATTERNS",
        help="names of the layers to quantize, with wildcards, separated by commas; repeatable",
    )
    group.add_argument(
        "--exclude", action="append", metavar="PATTERNS", help="names of layers not to quantize"
    )
    group.add_argument(
        "--min_bits",
        type=integer,
        default=1,
        help="lowest bit-width of a layer's weights, 1 by default",
    )
    group.add_argument(
        "--max_bits", type=integer, help="highest bit-width of a layer's weights, 8 by default"
    )
    group.add_argument("--steps", type=integer, help="training steps, 1000 by default; 0 for none")
    group.add_argument(
        "--batch_size", type=integer, default=32, help="examples per training step, 32 by default"
    )
    group.add_argument(
        "--seed", type=integer, default=0, help="seed of random choices, 0 by default"
    )
    group.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _add_show(commands):
    command = commands.add_parser("show", help="print the bit-widths in a file")
    command.set_defaults(run=_show)
    command.add_argument("file", help="a .keras file, or a packed .safetensors file")


# The subcommands are imported when they run: `quantize` imports TensorFlow, which takes seconds.
def _quantize(options):
    from keras_learnbits.command_line.quantizing import quantize_command

    quantize_command(options)


def _show(options):
    from keras_learnbits.command_line.show import show_command

    show_command(options)
