"""Registration of classes, so that Keras can save and load them."""

import keras

# Layers and training steps call TensorFlow. This module is imported by all of them, so the check is
# here; otherwise each would fail in its own way under another backend.
if keras.backend.backend() != "tensorflow":
    raise ImportError(
        "keras_learnbits needs the TensorFlow backend: set KERAS_BACKEND=tensorflow before Keras "
        f"is imported. Received: the backend {keras.backend.backend()!r} instead of tensorflow"
    )

# Files contain the package's name and the class's, but not the module, so modules can be renamed.
register = keras.saving.register_keras_serializable(package="keras_learnbits")
