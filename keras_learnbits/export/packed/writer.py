"""Writes packed files: the bytes of a file from weights."""

import json
import zlib

import numpy as np
import tensorflow as tf

from keras_learnbits.export.packed import reader


def packed_bytes(weights, library, config=None):
    """The bytes of a packed file.

    Args:
        weights: List of `reader.PackedKernel` and `reader.PackedArray`.
        library: Version of this library.
        config: Dictionary, the model's configuration, or None to leave it out.

    Raises:
        reader.PackedFileError: The file could not be read back, e.g. because a name has characters
            that cannot be printed.

    Examples:
        >>> bias = reader.PackedArray("bias", (2,), "float32", {"float32": np.ones(2, "float32")})
        >>> content = packed_bytes([bias], library="0.1.0")
        >>> reader.parse(content).arrays()
        {'bias': array([1., 1.], dtype=float32)}
    """
    tensors = {
        name: np.concatenate([w.data[name] for w in weights if name in w.data])
        for name in reader.total_lengths(weights)
    }
    header = {
        "library": library,
        "crc32": reader.checksum(tensors),
        "weights": [
            {name: value for name, value in weight._asdict().items() if name != "data"}
            for weight in weights
        ],
    }
    if config is not None:
        header["config"] = config
    text = json.dumps(header, separators=(",", ":")).encode()
    tensors["header"] = np.frombuffer(zlib.compress(text, 9), np.uint8)
    _, container = reader.safetensors()
    content = container.save(_typed(tensors), {reader.FORMAT: reader.VERSION})
    reader.parse(content)  # no file is written that cannot be read
    return content


def _typed(tensors):
    """The tensors in the types under which safetensors stores them.

    NumPy has no bfloat16, and `reader` reads booleans as integers.
    """
    return {
        name: tensor.view(tf.as_dtype(name).as_numpy_dtype)
        if name in ("bfloat16", "bool")
        else tensor
        for name, tensor in tensors.items()
    }
