"""The one place where classes are made known to Keras's saving, and names to the library."""

import keras

# Layers and steps are written with TensorFlow: under another backend they would fail one by one.
if keras.backend.backend() != "tensorflow":
    raise ImportError(
        "keras_learnbits needs the TensorFlow backend: set KERAS_BACKEND=tensorflow before Keras "
        f"is imported. Received: the backend {keras.backend.backend()!r} instead of tensorflow"
    )

register = keras.saving.register_keras_serializable(package="keras_learnbits")


def choose(name, choices, argument):
    """Looks up what a user named.

    Args:
        name: The user's choice.
        choices: Dictionary of name to what it stands for.
        argument: Name of the user's argument, for the error.

    Raises:
        ValueError: `choices` has no such name.

    Examples:
        >>> choose("a", {"a": 1}, "letter")
        1
    """
    if isinstance(name, str) and name in choices:
        return choices[name]
    raise ValueError(
        f"`{argument}` must be one of {sorted(choices)}. Received: {argument}={name!r}"
    )
