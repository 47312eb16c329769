"""Files that appear complete or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """
    A place beside `path` to write a new file, which takes the place of `path` when the block ends, and is on the disk
    by then: a machine that loses power has the old one or the new one. After an error what was there before stays, and
    the new file is removed.

    The new file has the mode that any new file of the process has. The folder has to exist. A symbolic link is
    replaced, and not what it leads to.

    Example:

    ```python
    >>> with replacing("weights.safetensors") as staged:
    ...     save_file(tensors, staged)
    ```
    """
    path = Path(path)
    # Of one process and one moment only: two writers never share a half-written file.
    staged = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        yield staged
        _flush(staged)
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        # Not every file system can, and the file is whole by now.
        _flush(path.parent)


def _flush(path: Path) -> None:
    """Waits until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Replaces `path` by a file that holds `data`."""
    with replacing(path) as staged:
        staged.write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replaces `path` by a file that holds `text`, in UTF-8."""
    write_bytes(path, text.encode())
