"""Reading the Keras model that a command is given."""

import keras

# Importing these registers every class that a saved model may contain.
import keras_learnbits.quantization.quantize
import keras_learnbits.training.distillation
import keras_learnbits.training.sign_sgd  # noqa: F401


def load_model(path):
    """Loads a model that Keras saved.

    A model that was compiled with a custom loss or metric is loaded without being compiled.

    Args:
        path: Path of a `.keras` or `.h5` file.

    Raises:
        ValueError: Keras cannot load it.
    """
    try:
        return keras.models.load_model(path)
    except Exception:  # of many kinds: of zip files, HDF5, JSON, and of the constructors of layers
        try:
            return keras.models.load_model(path, compile=False)
        except Exception as error:
            raise ValueError(
                "The model must be a file that Keras saved (.keras or .h5), of layers that Keras "
                "or this library has; with custom layers call `keras_learnbits.quantize` from "
                f"Python. Received: {path}: {error}"
            ) from error
