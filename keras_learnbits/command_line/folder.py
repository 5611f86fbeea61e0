"""A folder that is written as a whole, or not at all."""

import os

from keras_learnbits.export._files import directory_written_as_a_whole


def check_free(path, overwrite, names):
    """Raises an error unless a folder may be written.

    Args:
        path: Path of the folder.
        overwrite: Whether it may replace a folder with files in it.
        names: Set of the names of files that may be replaced.

    Raises:
        FileExistsError: There is a file, or a folder with files that must stay.
    """
    if not os.path.lexists(path):
        return
    if not os.path.isdir(path):
        raise FileExistsError(f"--output_dir must be a folder. Received: {path}, which is a file")
    found = sorted(os.listdir(path))
    if found and not overwrite:
        raise FileExistsError(
            "--output_dir must be a new or an empty folder; --overwrite replaces one that an "
            f"earlier run wrote. Received: {path} with {_some(found)}"
        )
    others = [name for name in found if name not in names]
    if others:
        raise FileExistsError(
            "--overwrite replaces only folders with no other files than this command writes; "
            f"choose another --output_dir. Received: {path} with {_some(others)}"
        )


def new_folder(path, overwrite, names):
    """A folder that takes its name when it is complete.

    Args:
        path: Path of the folder.
        overwrite: Whether it may replace a folder with files in it.
        names: Set of the names of files that may be replaced.

    Returns:
        Context manager that yields the path of a temporary folder. At its end it raises a
        FileExistsError as `check_free` does, also because of files that appeared in the meantime.
    """
    return directory_written_as_a_whole(path, lambda path: check_free(path, overwrite, names))


def _some(names):
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
