"""The packed file: integer codes at their own bit-widths in the safetensors container.

`docs/packed_format.md` has the layout; `reader.py` reads it without TensorFlow and without the
rest of this library. `python -m keras_learnbits.export.packed FILE` prints the contents of a file.
"""

from typing import TYPE_CHECKING

from keras_learnbits.export.packed.reader import PackedFileError

if TYPE_CHECKING:
    from keras_learnbits.export.packed.saving import load_packed, load_packed_model, save_packed

__all__ = ["PackedFileError", "load_packed", "load_packed_model", "save_packed"]


def __getattr__(name):
    # Imported when first used: they need TensorFlow, which the command does not.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from keras_learnbits.export.packed import saving

    return getattr(saving, name)
