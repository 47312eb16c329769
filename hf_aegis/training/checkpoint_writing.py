"""What is said when a checkpoint, or the final model, cannot be written."""

import contextlib
import os
import shutil
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError

from hf_aegis.training.out_of_memory import is_out_of_memory


# A block of a file system: where a write has failed, the rest is taken.
_NOTHING = 2**12


class ModelNotSavedError(OSError):
    """A checkpoint or a model was not written; the message names its folder, the space left there, and the reason."""


@contextlib.contextmanager
def naming_folder(folder: str | os.PathLike) -> Iterator[None]:
    """
    A block that writes into a folder, whose error says which and how much space is left there. Neither safetensors nor
    PyTorch name a file that they cannot write, and PyTorch does not name the reason.

    Raises:
        ModelNotSavedError: In the place of the error that was raised, if it is one of writing.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and (is_out_of_memory(error) or not _comes_from_saving(error)):
            raise
        free, written = _free_bytes(Path(folder)), _written_bytes(Path(folder))
        raise ModelNotSavedError(
            f"{folder} could not be written: {' '.join(str(error).split())} ({written / 2**20:.1f} MiB are there, and "
            f"{free / 2**20:.1f} MiB are free{': the disk is full' if free < _NOTHING else ''})"
        ) from error


def _comes_from_saving(error: RuntimeError) -> bool:
    """Whether PyTorch could not write a file; processes that wait for one another raise errors of the same type."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__") == torch.serialization.__name__


# Another process may delete the folder meanwhile, which must not hide what went wrong.
def _free_bytes(folder: Path) -> int:
    for place in (folder, *folder.absolute().parents):
        with contextlib.suppress(FileNotFoundError):
            return shutil.disk_usage(place).free
    raise AssertionError("there is always a root")


def _written_bytes(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total
