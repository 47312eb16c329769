"""One process at a time in a run's folder."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


LOCK_FILE = ".lock"


@contextlib.contextmanager
def locked_folder(folder: str | os.PathLike) -> Iterator[None]:
    """
    Holds a run's folder, which is created, for the time of a `with` block. The system lets go of it when the process
    ends, however it ends; the empty file `.lock` stays and means nothing.

    Raises:
        ValueError: If another process, or another block of this one, holds the folder.
    """
    # POSIX only: imported here, so that the rest of the package does not depend on it.
    import fcntl

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process is running in {folder}: wait for it to end, or choose another output_dir"
            ) from error
        yield
