"""Reading example inputs and labels: `.npy` and `.npz` files, and folders of images."""

import os
import zipfile

import numpy as np

ARRAY_FILES = (".npy", ".npz")
# Largest number of images that are read from a folder without labels: `quantize` keeps no more.
# Fewer are read if they are large.
MOST_IMAGES = 8192
COLOR_MODES = {1: "grayscale", 3: "rgb", 4: "rgba"}


def check_exists(argument, path):
    """Raises a FileNotFoundError that names an argument, unless its path exists."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{argument}: no such file or folder: {path}")


def read_inputs(argument, path, model, scale, in_order, seed):
    """Example inputs of a model.

    Args:
        argument: Name of the argument, for errors.
        path: Path of a `.npy` or `.npz` file, or of a folder of images.
        model: The Keras model.
        scale: Number that all values are multiplied by, or None; see `check_scale`.
        in_order: Whether all examples are needed in their order, because labels belong to them.
        seed: Integer, the seed of the random choice of images from a folder without labels.

    Returns:
        Structure of `LazyRows`, as the model takes it.

    Raises:
        ValueError: The file is of another format, or its arrays are not named as inputs.
    """
    if os.path.isdir(path):
        inputs = _read_images(argument, path, model, in_order, seed)
    elif path.endswith(ARRAY_FILES):
        inputs = _read_arrays(argument, path, model)
    else:
        raise ValueError(
            f"{argument} must be a .npy file, an .npz file or a folder of images. Received: {path}"
        )
    import keras

    from keras_learnbits.calibration.lazy_rows import LazyRows

    factor = None if scale == 1 else scale
    return keras.tree.map_structure(lambda array: LazyRows(array, factor), inputs)


def check_scale(scale, model):
    """Raises a ValueError if values are to be scaled for an input of integers.

    Args:
        scale: Number, or None.
        model: The Keras model.
    """
    import keras

    from keras_learnbits._keras import symbolic_inputs

    wanted = symbolic_inputs(model)  # None in a model with a custom `call`
    specs = [] if wanted is None else keras.tree.flatten(wanted)
    dtypes = [keras.backend.standardize_dtype(each.dtype) for each in specs]
    if scale not in (None, 1) and not all("float" in dtype for dtype in dtypes):
        raise ValueError(
            "--scale needs a model whose inputs are floats: leave it out, and give the values that "
            f"the model was trained on. Received: --scale={scale:g} for inputs of types "
            f"{', '.join(dtypes)}"
        )


def read_labels(path):
    """The labels in a `.npy` file.

    Raises:
        ValueError: The file has another format, or no numbers.
    """
    labels = _load("--labels", path)
    if not isinstance(labels, np.ndarray) or labels.ndim == 0 or labels.dtype.kind not in "biuf":
        raise ValueError(
            "--labels must be a .npy file of class numbers or one-hot rows. Received: "
            f"{path} with {_describe(labels)}"
        )
    return labels


def _load(argument, path):
    try:
        # Mapped into memory, so that only the rows in use of a large file are read.
        return np.load(path, mmap_mode="r" if path.endswith(".npy") else None)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{argument} must be arrays of numbers as `numpy.save` or `numpy.savez` write them. "
            f"Received: {path}: {error}"
        ) from error


def _read_arrays(argument, path, model):
    loaded = _load(argument, path)
    if isinstance(loaded, np.ndarray):
        return loaded
    try:
        with loaded:
            arrays = dict(loaded)
    except (ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{argument} must be arrays of numbers. Received: {path}: {error}"
        ) from error
    return _as_inputs(argument, path, arrays, model)


def _as_inputs(argument, path, arrays, model):
    """The arrays of an `.npz` file in the structure of the model's inputs."""
    import keras

    from keras_learnbits._keras import symbolic_inputs

    wanted = symbolic_inputs(model)
    if len(arrays) == 1 and (wanted is None or len(keras.tree.flatten(wanted)) == 1):
        (array,) = arrays.values()
        return array if wanted is None else keras.tree.pack_sequence_as(wanted, [array])
    if wanted is None:
        return arrays
    names = [each.name for each in keras.tree.flatten(wanted)]
    if arrays.keys() != set(names):
        raise ValueError(
            f"{argument} must have one array for each input of the model, {', '.join(names)}. "
            f"Received: {path} with {_describe(arrays)}"
        )
    return keras.tree.pack_sequence_as(wanted, [arrays[name] for name in names])


def _read_images(argument, path, model, in_order, seed):
    """Images of a folder and of those in it, in float32 with values 0..255."""
    import keras

    from keras_learnbits._keras import symbolic_inputs
    from keras_learnbits.calibration.examples import most_examples

    height, width, channels = _image_shape(argument, model)
    try:
        images = keras.utils.image_dataset_from_directory(
            path,
            labels=None,
            color_mode=COLOR_MODES[channels],
            batch_size=None,
            image_size=(height, width),
            shuffle=not in_order,
            seed=seed,
            verbose=False,
        )
    except ValueError as error:
        raise ValueError(
            f"{argument} must be a folder of images. Received: {path}: {error}"
        ) from error
    paths = images.file_paths
    if in_order:
        # Keras lists the files of a folder before those of the folders in it.
        places = np.argsort(np.argsort(paths))
    else:
        places = range(min(len(paths), most_examples(symbolic_inputs(model), MOST_IMAGES)))
    found = np.empty((len(places), height, width, channels), "float32")
    for place, image in zip(places, images.take(len(places)).as_numpy_iterator(), strict=True):
        found[place] = image
    return found


def _image_shape(argument, model):
    """Height, width and channels of the images that a model takes."""
    import keras

    from keras_learnbits._keras import symbolic_inputs

    wanted = symbolic_inputs(model)  # None in a model with a custom `call`
    inputs = [] if wanted is None else keras.tree.flatten(wanted)
    shapes = [tuple(each.shape) for each in inputs]
    if len(shapes) == 1 and len(shapes[0]) == 4:
        height, width, channels = shapes[0][1:]
        if height and width and channels in COLOR_MODES:
            return height, width, channels
    raise ValueError(
        f"A folder as {argument} needs a model with one input of images, of a fixed size and with "
        "1, 3 or 4 channels last; save the examples of other models with `numpy.save`. "
        f"Received: inputs of shape {shapes}"
    )


def _describe(arrays):
    if isinstance(arrays, np.ndarray):
        return f"{arrays.dtype} of shape {arrays.shape}"
    return "arrays " + ", ".join(arrays)
