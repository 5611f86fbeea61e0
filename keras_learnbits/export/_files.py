"""Atomic writing of files and directories."""

import contextlib
import os
import shutil
import stat
import uuid

# Permissions of a new file, from which the system subtracts the umask, as for `open`.
NEW_FILE_MODE = 0o666


def write_atomically(path, content, check=None):
    """Writes a file so that it is complete even if the process is killed.

    The content goes to a temporary file in the same directory, which is then renamed. Until then
    an old file is unchanged. If the path is a symbolic link, the file that it points to is
    replaced. An existing file keeps its permissions.

    Args:
        path: Path of the file; its directory must exist.
        content: Bytes of the file.
        check: Function of the temporary file's path that raises an error if the file must not be
            kept, or None.

    Raises:
        OSError: The file cannot be written. The old file is unchanged, and no other file is left.
    """
    # `os.replace` would replace the link itself, so follow it first.
    path = os.path.realpath(path)
    mode = _mode_of(path)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"

    def create(name, flags):
        # Created with the old file's permissions, so that nobody else can read it meanwhile.
        return os.open(name, flags, NEW_FILE_MODE if mode is None else mode)

    try:
        with open(temporary, "xb", opener=create) as file:
            file.write(content)
            file.flush()
            # Otherwise a power failure may leave the new name with an empty file.
            os.fsync(file.fileno())
        if mode is not None:
            os.chmod(temporary, mode)  # the umask may have removed some
        if check is not None:
            check(temporary)
        os.replace(temporary, path)
    except BaseException:  # also an interrupt by the user
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


@contextlib.contextmanager
def directory_written_as_a_whole(path, check_free):
    """A directory that takes its name when it is complete.

    Files go to a temporary directory next to it, which is renamed at the end of the `with` block.
    After an error or an interruption no file is left, and an old directory is unchanged.

    Args:
        path: Path of the directory. If it is a symbolic link, what it points to is replaced.
        check_free: Function of the path that raises an error if what is there must stay. It is
            called at the end, for what has appeared in the meantime; call it before long work, too.

    Yields:
        Path of the temporary directory.
    """
    # A rename would replace a symbolic link itself, so follow it first.
    path = os.path.realpath(path)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    os.makedirs(temporary)
    try:
        yield temporary
        check_free(path)
        _rename_over(temporary, path)
    except BaseException:  # also an interrupt by the user
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _rename_over(temporary, path):
    """Renames a directory, and removes the one that had its name."""
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


def _mode_of(path):
    """Permissions of a file; None if it does not exist."""
    try:
        return stat.S_IMODE(os.stat(path).st_mode)
    except FileNotFoundError:
        return None
