"""Files that are whole or not there, whatever happens while they are written."""

import os
import stat
import uuid

NEW_FILE_MODE = 0o666  # less the umask, as `open` does


def write_atomically(path, content, check=None):
    """Writes a file that, whenever the process is killed, is the old one or the new one.

    The content goes to a temporary file in the same directory, which is then renamed. A link
    stays a link: the file that it points to is replaced. An existing file keeps its permissions.

    Args:
        path: Path of the file; its directory must exist.
        content: Bytes.
        check: Function of the temporary file's path that raises an error if the file must not be
            kept, or None.

    Raises:
        OSError: It cannot be written. The old file stands, and no other is left.
    """
    # `os.replace` would replace a link itself, so the rename happens where the link leads.
    path = os.path.realpath(path)
    mode = _mode_of(path)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"

    def create(name, flags):
        # Never readable by more users than the old file, not even for the time of writing.
        return os.open(name, flags, NEW_FILE_MODE if mode is None else mode)

    try:
        with open(temporary, "xb", opener=create) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            os.chmod(temporary, mode)  # the umask may have taken something away
        if check is not None:
            check(temporary)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def _mode_of(path):
    """Permissions of a file; None if there is none."""
    try:
        return stat.S_IMODE(os.stat(path).st_mode)
    except FileNotFoundError:
        return None
