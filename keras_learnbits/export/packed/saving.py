"""`save_packed`, `load_packed` and `load_packed_model`: Keras models in packed files."""

import keras

from keras_learnbits._version import __version__
from keras_learnbits.export._files import write_atomically
from keras_learnbits.export._weights import check_finite
from keras_learnbits.export.packed import reader, weights, writer
from keras_learnbits.export.packed.config import (
    check_config,
    check_vocabularies,
    check_without_config,
    model_config,
    model_of,
)
from keras_learnbits.layers.discovery import quantized_kernels

FLOAT_DTYPES = ("float32", "bfloat16")


def save_packed(model, path, float_dtype="float32", include_config=False):
    """Writes a model to a file of about `bit_table(model).packed_bytes` bytes.

    Each kernel is stored as integer codes of its bit-width, with its steps and offsets. Biases,
    normalization and layers that are not quantized are stored as `float_dtype`, integer weights
    with their dtype. States of optimizers, metrics and random seeds are not stored. The file has
    the safetensors format; `docs/packed_format.md` describes its layout. It is written under
    another name and then renamed, so that it is complete even if the process is killed.

    Args:
        model: A built Keras model with learned-bit layers.
        path: Path of the file.
        float_dtype: `"float32"`, or `"bfloat16"`, which halves the size of weights that are not
            quantized, and rounds them; scalars stay float32.
        include_config: Whether the file also has the model's configuration and vocabularies, about
            1 to 3 kB, so that `load_packed_model` can make the model. A copy is then made to check
            that it has the same weights and predictions. Custom classes that are not registered
            must be given to `load_packed_model`. Custom functions must be registered, or be in a
            `keras.saving.custom_object_scope` around this call as well.

    Raises:
        ValueError: The model is not built, has no learned-bit layer, a weight that is not finite, a
            kernel that two layers quantize, or, without `include_config`, an adapted vocabulary;
            with `include_config`, it has no configuration, or one that makes a different model,
            e.g. because layers share a weight; or `float_dtype` is unknown. Then no file is
            written, and an old one is unchanged.
        OSError: The file cannot be written. An old one is unchanged.

    Examples:
        >>> import os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
        >>> model = keras_learnbits.LearnedBitSequential(
        ...     [keras.Input((64,)), keras_learnbits.LearnedBitDense(256, bits=2, name="dense")])
        >>> save_packed(model, path)
        >>> os.path.getsize(path) - keras_learnbits.bit_table(model).packed_bytes < 600
        True
    """
    if float_dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"`float_dtype` must be one of {FLOAT_DTYPES}. Received: float_dtype={float_dtype!r}"
        )
    if not isinstance(model, keras.Model) or not quantized_kernels(model):
        raise ValueError(
            "`save_packed` needs a built Keras model with at least one learned-bit layer. "
            f"Received: model={model!r}"
        )
    check_finite(model)
    config = model_config(model) if include_config else check_without_config(model)
    packed = weights.packed_weights(model, float_dtype)
    content = writer.packed_bytes(packed, __version__, config)

    def check(path):
        if include_config:
            check_config(model, reader.read_packed(path))

    write_atomically(path, content, check)


def load_packed(path, into=None):
    """Reads the weights of a packed file, and loads them into a model if one is given.

    To read a file without TensorFlow, copy `keras_learnbits/export/packed/reader.py`, which needs
    NumPy and safetensors only; its `read_packed(path).arrays()` returns the same arrays.

    Args:
        path: Path of the file.
        into: A built Keras model with the layers of the packed one, or None. In learned-bit layers
            kernels, bit-widths and scales are set so that the model makes the predictions of the
            packed one; plain layers get the quantized weights. Weights are matched by name, except
            for the numbers in automatic names of layers; or in their order if all names differ. If
            only some names differ, an error is raised.

    Returns:
        Dictionary of name to array: float32 for quantized kernels, equal to the model's quantized
        weights bit for bit, and for other float weights; integer weights have their dtype.

    Raises:
        PackedFileError: The file is not a packed file, has an unknown version, is truncated or
            damaged.
        ValueError: `into` has other weights or vocabularies, or kernels that cannot represent these
            because of their quantizer, bounds of bits, or dtype. Then nothing is changed.
        OSError: The file cannot be opened.

    Examples:
        >>> import os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
        >>> model = keras_learnbits.LearnedBitSequential(
        ...     [keras.Input((8,)), keras_learnbits.LearnedBitDense(2, bits=1, name="dense")])
        >>> save_packed(model, path)
        >>> arrays = load_packed(path)
        >>> quantized = model.layers[0].quantized_kernels["kernel"].quantized()
        >>> bool(np.all(arrays["dense/kernel"] == quantized))
        True
    """
    file = reader.read_packed(path)
    if into is not None:
        check_vocabularies(into, file.config)
        weights.fill(into, file.weights)
    return file.arrays()


def load_packed_model(path, custom_objects=None):
    """Makes the model of a packed file that was saved with its configuration.

    Keras makes the model as `keras.models.load_model` does, in safe mode: it may import the modules
    that the file names, so load only files from sources that you trust. (`load_packed` executes
    nothing.)

    Args:
        path: Path of a file that `save_packed(..., include_config=True)` wrote.
        custom_objects: Dictionary of name to class or function that Keras does not know.

    Returns:
        A model that makes the predictions of the packed one. It is not compiled.

    Raises:
        PackedFileError: The file has no configuration, or cannot be read.
        ValueError: Keras cannot make or build the model.
        OSError: The file cannot be opened.

    Examples:
        >>> import os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
        >>> model = keras_learnbits.LearnedBitSequential(
        ...     [keras.Input((8,)), keras_learnbits.LearnedBitDense(2, bits=1)])
        >>> save_packed(model, path, include_config=True)
        >>> x = np.ones((3, 8))
        >>> loaded = load_packed_model(path)
        >>> bool(np.all(loaded.predict(x, verbose=0) == model.predict(x, verbose=0)))
        True
    """
    file = reader.read_packed(path)
    if file.config is None:
        raise reader.PackedFileError(
            "To make a model from a packed file, save it with `include_config=True`; or fill one "
            f"with `load_packed(path, into=model)`. Received: path={str(path)!r}"
        )
    return model_of(file, custom_objects)
