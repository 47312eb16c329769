"""What keeps a checkpoint from being read, found without reading it whole."""

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME

from hf_aegis.json_files import read_json_object
from hf_aegis.training.expert_ema import EMA_FILE


# Beside the weights, what a training needs to go on as if it had not been interrupted: all of it or, with
# `save_only_model`, nothing. transformers would pass over what is missing.
_STATES = ("optimizer.*", SCHEDULER_NAME, "rng_state*.pth")


def find_fault(checkpoint: str | os.PathLike) -> str | None:
    """
    What is wrong with a checkpoint, with the file's name, or `None`.

    Looked at is what a cut or zeroed file lacks: the header of safetensors, which tells the file's size, the directory
    at the end of PyTorch's archives, the whole of JSON. That takes no time with weights of any size; a byte that
    changed inside a tensor is not found.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return f"there is no folder {folder}"
    if not is_finished(folder):
        return f"{folder / TRAINER_STATE_NAME} is missing or cut off: the checkpoint was not written to its end"
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        try:
            _CHECKS.get(path.suffix, _pass)(path)
        except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
            return f"{path} ({path.stat().st_size} bytes) cannot be read: {error}"
    if not any(path.suffix == ".safetensors" and path.name != EMA_FILE for path in files):
        return f"{folder} holds no weights (*.safetensors)"
    for index in folder.glob("*.safetensors.index.json"):
        for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values())):
            if not (folder / name).is_file():
                return f"{folder / name} is missing, which {index.name} names"
    missing = [pattern for pattern in _STATES if not any(folder.glob(pattern))]
    if 0 < len(missing) < len(_STATES):
        return f"{folder / missing[0]} is missing"
    return None


def is_finished(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: `trainer_state.json` is what the trainer writes last."""
    try:
        # A loss that was not finite is written as it is.
        read_json_object(checkpoint / TRAINER_STATE_NAME, finite=False)
    except (OSError, ValueError):
        return False
    return True


def has_finite_weights(checkpoint: Path) -> bool:
    """Whether all tensors in a checkpoint's safetensors are finite. Reads them, one at a time."""
    for path in checkpoint.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            if not all(torch.isfinite(file.get_tensor(name)).all() for name in names):
                return False
    return True


def _check_safetensors(path: Path) -> None:
    with safe_open(path, framework="pt"):
        pass


def _check_archive(path: Path) -> None:
    with zipfile.ZipFile(path):
        pass


def _check_json(path: Path) -> None:
    json.loads(path.read_bytes())


def _pass(path: Path) -> None:
    pass


_CHECKS: dict[str, Callable[[Path], None]] = {
    ".safetensors": _check_safetensors,
    ".json": _check_json,
    **dict.fromkeys((".pt", ".pth", ".bin"), _check_archive),
}
