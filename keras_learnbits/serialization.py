"""The one place where classes are made known to Keras's saving, and names to the library."""

import keras

# Layers and steps are written with TensorFlow: under another backend they would fail one by one.
if keras.backend.backend() != "tensorflow":
    raise ImportError(
        "keras_learnbits needs the TensorFlow backend: set KERAS_BACKEND=tensorflow before Keras "
        f"is imported. Received: the backend {keras.backend.backend()!r} instead of tensorflow"
    )

register = keras.saving.register_keras_serializable(package="keras_learnbits")
