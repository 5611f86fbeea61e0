"""The subcommand `show`: the bit-widths in a file."""

from keras_learnbits.command_line.inputs import check_exists
from keras_learnbits.export.packed.__main__ import bit_table_of

KERAS_FILES = (".keras", ".h5")


def show_command(options):
    """Prints the table of a Keras file or of a packed file.

    A packed file is read without TensorFlow.

    Args:
        options: Parsed arguments, with `file`.

    Raises:
        ValueError: The file is neither a Keras file with learned-bit layers nor a packed file.
        OSError: The file cannot be read.
    """
    check_exists("FILE", options.file)
    if not options.file.endswith(KERAS_FILES):
        print(bit_table_of(options.file))
        return
    from keras_learnbits.command_line.models import load_model
    from keras_learnbits.inspection.bit_table import bit_table
    from keras_learnbits.layers.discovery import quantized_kernels

    model = load_model(options.file)
    if not quantized_kernels(model):
        raise ValueError(
            "FILE must have a model with learned-bit layers, as the command `quantize` writes it. "
            f"Received: {options.file}, a float model"
        )
    print(bit_table(model))
