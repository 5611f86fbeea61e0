"""Atomic writing of files."""

import os
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


def _mode_of(path):
    """Permissions of a file; None if it does not exist."""
    try:
        return stat.S_IMODE(os.stat(path).st_mode)
    except FileNotFoundError:
        return None
