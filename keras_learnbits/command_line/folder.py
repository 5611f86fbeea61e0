"""A folder that is written as a whole, or not at all."""

import contextlib
import os
import shutil
import uuid


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


@contextlib.contextmanager
def new_folder(path, overwrite, names):
    """A folder that takes its name when it is complete.

    Files go to a temporary folder next to it, which is renamed at the end of the `with` block.
    After an error or an interruption no file is left, and an old folder is unchanged.

    Args:
        path: Path of the folder.
        overwrite: Whether it may replace a folder with files in it.
        names: Set of the names of files that may be replaced.

    Yields:
        Path of the temporary folder.

    Raises:
        FileExistsError: There is a file, or a folder with files that must stay, also if they
            appear in the meantime.
    """
    # A rename would replace a symbolic link itself, so follow it first.
    path = os.path.realpath(path)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    os.makedirs(temporary)
    try:
        yield temporary
        check_free(path, overwrite, names)
        _replace(temporary, path)
    except BaseException:  # also an interrupt by the user
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _replace(temporary, path):
    """Renames a folder, and removes the one that had its name."""
    if not os.path.exists(path):
        os.rename(temporary, path)
        return
    old = f"{path}.{uuid.uuid4().hex}.old"
    os.rename(path, old)
    try:
        os.rename(temporary, path)
    except BaseException:
        os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _some(names):
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
