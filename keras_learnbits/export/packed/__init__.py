"""The packed file: integer codes at their own bit-widths in the safetensors container.

`docs/packed_format.md` has the layout; `reader.py` reads it without TensorFlow and without the
rest of this library. `python -m keras_learnbits.export.packed FILE` shows what a file holds.
"""

from keras_learnbits.export.packed.reader import PackedFileError
from keras_learnbits.export.packed.saving import load_packed, load_packed_model, save_packed

__all__ = ["PackedFileError", "load_packed", "load_packed_model", "save_packed"]
