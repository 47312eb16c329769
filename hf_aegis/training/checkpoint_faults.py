"""What keeps a checkpoint from being read, found without reading it whole."""

import dataclasses
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME

from hf_aegis.hub.names import is_file_name
from hf_aegis.json_files import is_kind, parse_json, read_json_object, require_keys
from hf_aegis.training.expert_ema import EMA_FILE


# Beside the weights, what a training needs to go on as if it had not been interrupted: all of it or, with
# `save_only_model`, nothing. transformers would pass over what is missing.
_STATES = ("optimizer.*", SCHEDULER_NAME, "rng_state*.pth")
# What the Trainer reads of its state, which it takes as it is.
_STATE_KEYS: dict[str, type | tuple[type, ...]] = {
    "global_step": int,
    **dict.fromkeys(("epoch", "best_metric"), (float, type(None))),
    **dict.fromkeys(("train_batch_size", "best_global_step"), (int, type(None))),
    "best_model_checkpoint": (str, type(None)),
    "log_history": (list, type(None)),
    "stateful_callbacks": (dict, type(None)),
}


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
    if (fault := _state_fault(folder / TRAINER_STATE_NAME)) is not None:
        return fault
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        try:
            _CHECKS.get(path.suffix, _pass)(path)
        # What zipfile does not implement is what an archive from PyTorch does not need.
        except (OSError, ValueError, SafetensorError, zipfile.BadZipFile, NotImplementedError) as error:
            return f"{path} ({_size(path)}) cannot be read: {error}"
    if not any(path.suffix == ".safetensors" and path.name != EMA_FILE for path in files):
        return f"{folder} holds no weights (*.safetensors)"
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            parts = require_keys(read_json_object(index, finite=False), {"weight_map": dict}, index)["weight_map"]
        except (OSError, ValueError) as error:
            return str(error)
        for tensor, name in parts.items():
            if not is_file_name(name):
                return f"{index}: weight_map[{tensor!r}] is {name!r}, expected the name of a file beside it"
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


def _state_fault(path: Path) -> str | None:
    """What keeps the Trainer from going on with a `trainer_state.json`. What callbacks keep there, they look at."""
    try:
        state = require_keys(read_json_object(path, finite=False), _STATE_KEYS, path)
    except (OSError, ValueError) as error:
        return str(error)
    if unknown := sorted(state.keys() - {field.name for field in dataclasses.fields(TrainerState)}):
        return f"{path}: the Trainer knows no key {unknown[0]!r}"
    for key in ("global_step", "total_flos", "num_input_tokens_seen"):
        # No training comes near this bound.
        if not (is_kind(value := state.get(key, 0), (float,)) and 0 <= value < 1e30):
            return f"{path}: key {key!r} is {value!r}, expected a count"
    if not all(isinstance(record, dict) for record in state.get("log_history") or []):
        return f"{path}: key 'log_history' holds something else than objects"
    return None


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
    # A callback may keep anything in a file of its own, also beside a number that is not finite.
    value = parse_json(path.read_bytes(), path.name, finite=False)
    if path.name.endswith("config.json") and not isinstance(value, dict):
        raise ValueError(f"{path.name} holds no JSON object")


def _size(path: Path) -> str:
    try:
        return f"{path.stat().st_size} bytes"
    except OSError:
        return "gone"


def _pass(path: Path) -> None:
    pass


_CHECKS: dict[str, Callable[[Path], None]] = {
    ".safetensors": _check_safetensors,
    ".json": _check_json,
    **dict.fromkeys((".pt", ".pth", ".bin"), _check_archive),
}
