"""Which checkpoint of an interrupted run can be resumed, and its weights."""

import functools
import logging
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN

from hf_aegis.training.checkpoint_faults import find_fault, has_finite_weights, is_finished


logger = logging.getLogger(__name__)


def last_complete_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """
    The newest checkpoint under `output_dir` that can be resumed, or `None` where none was written to its end.

    The trainer writes a checkpoint's `trainer_state.json` last; a run that was killed while saving leaves a folder
    without it, or with half of it. Such folders are passed over, and so are those with a file that cannot be read,
    each with a warning that says why.

    Raises:
        ValueError: If there are checkpoints that were written to their end, and none of them can be read.
    """
    damaged: list[str] = []
    for folder in _newest_first(output_dir):
        fault = find_fault(folder)
        if fault is None:
            if damaged:
                logger.warning("%s is the newest checkpoint that can be read", folder)
            return folder
        logger.warning("%s is passed over: %s", folder, fault)
        if is_finished(folder):
            damaged.append(fault)
    if damaged:
        raise ValueError(
            f"no checkpoint in {output_dir} can be resumed: {'; '.join(damaged)}. Put back what is missing, or delete "
            "the folders named checkpoint-* to begin anew"
        )
    return None


def how_to_go_on(output_dir: str | os.PathLike, finite: bool = False) -> str:
    """
    For the end of an error: what is left of a training, and how it is continued. With `finite` the checkpoint that is
    named is one with finite weights, which are read for that.
    """
    try:
        newest = last_complete_checkpoint(output_dir)
    except ValueError as error:
        return str(error)
    if newest is None:
        return f"There is no whole checkpoint in {output_dir}: started again, the training begins anew"
    if not finite or has_finite_weights(newest):
        return f"The last whole checkpoint is {newest}: started again, the training goes on from there"
    broken: list[str] = []
    for folder in (whole for whole in _newest_first(output_dir) if find_fault(whole) is None):
        if has_finite_weights(folder):
            return (
                f"The last checkpoint with finite weights is {folder}: delete {', '.join(broken)} beside it, and "
                "started again, the training goes on from there"
            )
        broken.append(folder.name)
    return f"No checkpoint in {output_dir} has finite weights: delete the folders named checkpoint-* to begin anew"


def _newest_first(output_dir: str | os.PathLike) -> list[Path]:
    folders = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(folders, key=lambda p: int(p.name.split("-")[1]), reverse=True)


def refuse_other_kind(checkpoint: str | os.PathLike, sharded: bool) -> None:
    """
    Args:
        checkpoint (`str` or `os.PathLike`): What is to be resumed.
        sharded (`bool`): Whether the training is sharded by FSDP.

    Raises:
        ValueError: If the training that saved `checkpoint` was not. The Trainer would pass over its optimiser.
    """
    other = Path(checkpoint) / (OPTIMIZER_NAME if sharded else OPTIMIZER_NAME_BIN)
    if other.is_file():
        now, then = ("with", "without") if sharded else ("without", "with")
        raise ValueError(
            f"{checkpoint} was saved {then} FSDP ({other.name}), and is resumed {now} it: the number of processes may "
            f"change, but not the form of the optimiser's state. Resume {then} FSDP, or begin a new training with "
            "these weights (from_pretrained)"
        )


def load_weights(model: PreTrainedModel, checkpoint: str | os.PathLike) -> None:
    """
    Loads the weights of `checkpoint` into `model`, as `from_pretrained` reads them. Where FSDP2 has sharded them, all
    processes have to call it, and the first reads.

    transformers renames the weights of PaliGemma and of π0 between memory and disk. The Trainer's own loading does
    not, and passes over names that differ: a resumed run would go on with the pre-trained language model.

    Raises:
        ValueError: If the checkpoint lacks a weight of the model, or holds others.
    """
    if not isinstance(model, FSDPModule):
        model.load_state_dict(_read_weights(model, checkpoint))
        return
    weights = _read_weights(model, checkpoint) if distributed.get_rank() == 0 else {}
    several = distributed.get_world_size() > 1
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=several)
    set_model_state_dict(model, weights, options=options)


def _read_weights(model: PreTrainedModel, checkpoint: str | os.PathLike) -> dict[str, Any]:
    # Wide enough for every parameter, so that none is rounded on its way.
    dtype = functools.reduce(torch.promote_types, (p.dtype for p in model.parameters()))
    with torch.random.fork_rng([]):
        found: Any = type(model).from_pretrained(
            checkpoint, config=model.config, dtype=dtype, output_loading_info=True, use_safetensors=True
        )
    loaded, info = found
    for kind in ("missing_keys", "unexpected_keys"):
        if info[kind]:
            raise ValueError(f"{checkpoint} does not fit {type(model).__name__}: {kind} {sorted(info[kind])[:3]}")
    return loaded.state_dict()
