"""What is said when a checkpoint, or the final model, cannot be written."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from hf_aegis.training.out_of_memory import is_out_of_memory


class ModelNotSavedError(OSError):
    """A checkpoint or a model was not written; the message names its folder, the space left there, and the reason."""


@contextlib.contextmanager
def naming_folder(folder: str | os.PathLike) -> Iterator[None]:
    """
    A block that writes into a folder, whose error says which and how much space is left there. Neither safetensors nor
    PyTorch name a file that they cannot write, and PyTorch does not name the reason.

    Raises:
        ModelNotSavedError: In the place of the error that was raised.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        folder = Path(folder)
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free / 2**20
        written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
        raise ModelNotSavedError(
            f"{folder} could not be written: {' '.join(str(error).split())} ({written:.1f} MiB are there, and "
            f"{free:.1f} MiB are free)"
        ) from error
