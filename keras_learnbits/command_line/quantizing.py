"""The subcommand `quantize`: reads a model and example inputs, and writes a folder of files."""

import datetime
import json
import logging
import os
import sys
import warnings

from keras_learnbits._version import __version__
from keras_learnbits.command_line.inputs import check_exists

TARGETS = (
    "target_bits",
    "target_bytes",
    "target_compression",
    "target_bit_operations",
    "max_accuracy_drop",
)


def quantize_command(options):
    """Quantizes a model, and writes it in all formats with a report.

    Args:
        options: Parsed arguments of `quantize`.

    Raises:
        ValueError: An argument, a file or the model does not fit.
        OSError: A file cannot be read or written, or the folder has files in it.
    """
    _check_arguments(options)
    # Imported when the arguments are known to be right, because TensorFlow takes seconds.
    from keras_learnbits.command_line.examples import read_examples
    from keras_learnbits.command_line.files import NAMES, write_model
    from keras_learnbits.command_line.folder import check_free, new_folder
    from keras_learnbits.command_line.models import load_model
    from keras_learnbits.command_line.page import report_page

    check_free(options.output_dir, options.overwrite, NAMES)
    _silence_loggers()
    model = load_model(options.model)
    student, notes = _quantized(model, read_examples(options, model), options)
    with new_folder(options.output_dir, options.overwrite, NAMES) as folder:
        files, skipped = write_model(
            folder, student, _quantizes_activations(options), options.power_of_two
        )
        summary = _summary(student, options, files, skipped, notes)
        _write_text(folder, "report.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
        _write_text(folder, "report.html", report_page(summary))
    if not options.quiet:
        _print_result(student, options.output_dir, files, skipped)


def _check_arguments(options):
    """Raises an error for faults of the arguments that can be found without TensorFlow."""
    for argument in ("model", "data", "labels", "validation_data"):
        path = getattr(options, argument)
        if path is not None:
            check_exists("MODEL" if argument == "model" else f"--{argument}", path)
    if options.target_bit_operations is not None and not _quantizes_activations(options):
        raise ValueError(
            "--target_bit_operations counts the bits of layer inputs: give --activations or "
            f"--power_of_two. Received: --target_bit_operations={options.target_bit_operations:g}"
        )
    if options.labels is None:
        for argument in ("max_accuracy_drop", "validation_data"):
            value = getattr(options, argument)
            if value is not None:
                raise ValueError(
                    f"--{argument} needs labels: give --labels=labels.npy. "
                    f"Received: --{argument}={value} without --labels"
                )


def _quantizes_activations(options):
    return options.activations or options.power_of_two


def _silence_loggers():
    """Hides the warnings of TensorFlow and its converters, which are for programmers."""
    for name in ("tensorflow", "absl"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _quantized(model, examples, options):
    """Quantizes a model; its report has the accuracy if there are labels.

    Returns:
        Tuple of the quantized model and a list of strings, the warnings.
    """
    from keras_learnbits.quantization.quantize import quantize

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        student = quantize(
            model,
            examples.calibration,
            **_target(options),
            validation_data=examples.validation,
            activations=_quantizes_activations(options),
            power_of_two=options.power_of_two,
            include=_patterns(options.include),
            exclude=_patterns(options.exclude),
            min_bits=options.min_bits,
            max_bits=options.max_bits,
            steps=options.steps,
            batch_size=options.batch_size,
            seed=options.seed,
            verbose=_verbosity(options),
        )
    notes = [str(each.message) for each in caught if issubclass(each.category, UserWarning)]
    notes = list(dict.fromkeys(notes))
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    return student, notes


def _target(options):
    """Dictionary of the one target that is given to its value."""
    given = {name: getattr(options, name) for name in TARGETS}
    return {name: value for name, value in given.items() if value is not None}


def _patterns(arguments):
    """The names in repeated arguments that are separated by commas; None if there are none."""
    if arguments is None:
        return None
    return [name.strip() for each in arguments for name in each.split(",") if name.strip()]


def _verbosity(options):
    if options.quiet:
        return 0
    return 1 if sys.stdout.isatty() else 2


def _summary(student, options, files, skipped, notes):
    """The content of `report.json` and `report.html`: numbers, strings, lists, dictionaries."""
    table = student.quantization.table
    return {
        "model": student.name,
        "source": os.path.basename(options.model),
        "command": options.command,
        "version": __version__,
        "date": datetime.date.today().isoformat(),
        "target": _target(options),
        "files": files,
        "skipped": skipped,
        "warnings": notes,
        **student.quantization.to_dict(),
        "shapes": {row.layer: list(row.shape) for row in table.rows},
        "activation_bits": {row.layer: row.bits for row in table.activations},
        "float_parameters": table.float_parameters,
    }


def _write_text(folder, name, text):
    with open(os.path.join(folder, name), "x", encoding="utf-8") as file:
        file.write(text)


def _print_result(student, folder, files, skipped):
    print(student.quantization.table)
    print(student.quantization)
    for name, size in files.items():
        print(f"{os.path.join(folder, name)}: {size:,} bytes")
    for name, reason in skipped.items():
        print(f"{name} skipped: {reason}")
    print(f"{os.path.join(folder, 'report.html')}: the report")
