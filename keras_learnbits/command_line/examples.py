"""Splits examples into those that calibrate a model and those that measure its accuracy."""

from typing import Any, NamedTuple

import keras
import numpy as np

from keras_learnbits.command_line.inputs import check_scale, read_inputs, read_labels


class Examples(NamedTuple):
    """The examples of one run.

    Attributes:
        calibration: Structure of `LazyRows`, inputs without labels.
        validation: Tuple of inputs and labels, or None.
    """

    calibration: Any
    validation: tuple | None


def read_examples(options, model):
    """Reads the files that the arguments name.

    Args:
        options: Parsed arguments, with `data`, `labels`, `validation_data`, `scale` and `seed`.
        model: The Keras model.

    Returns:
        `Examples`. No example is in both parts, unless it is in both files.

    Raises:
        ValueError: A file has another format, there are more or fewer labels than examples, or the
            model takes integers and values are to be scaled.
    """
    check_scale(options.scale, model)
    split = options.labels is not None and options.validation_data is None

    def read(argument, path, in_order):
        return read_inputs(argument, path, model, options.scale, in_order, options.seed)

    inputs = read("--data", options.data, split)
    if options.labels is None:
        return Examples(inputs, None)
    labels = read_labels(options.labels)
    if not split:
        validation = read("--validation_data", options.validation_data, True)
        _check_sizes("--validation_data", validation, labels)
        return Examples(inputs, (validation, labels))
    _check_sizes("--data", inputs, labels)
    order = np.random.default_rng(options.seed).permutation(len(labels))
    calibrating, measuring = np.sort(order[::2]), np.sort(order[1::2])
    return Examples(
        keras.tree.map_structure(lambda array: array.rows(calibrating), inputs),
        (keras.tree.map_structure(lambda array: array.rows(measuring), inputs), labels[measuring]),
    )


def _check_sizes(argument, inputs, labels):
    sizes = [len(array) for array in keras.tree.flatten(inputs)]
    if set(sizes) != {len(labels)}:
        raise ValueError(
            f"--labels must have one label for each example of {argument}. "
            f"Received: {len(labels)} labels, {' and '.join(map(str, sizes))} examples"
        )
