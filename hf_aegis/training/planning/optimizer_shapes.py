"""Optimisers of parameters that have shapes and no values."""

from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.training_args import OptimizerNames

from hf_aegis.training.aegis_config import AEGISConfig


_TORCH = (
    *(OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED, OptimizerNames.SGD, OptimizerNames.ADAGRAD),
    *(OptimizerNames.RMSPROP, OptimizerNames.ADAFACTOR),
)
_EIGHT_BIT = (
    OptimizerNames.ADAMW_BNB,
    OptimizerNames.ADAMW_8BIT,
    OptimizerNames.LION_8BIT,
    OptimizerNames.RMSPROP_8BIT,
)
PLANNED_OPTIMIZERS = tuple(name.value for name in (*_TORCH, *_EIGHT_BIT))
"""Values of `optim` whose memory can be planned."""


def make_optimizer(model: nn.Module, args: AEGISConfig, device: str) -> torch.optim.Optimizer:
    """
    The Trainer's optimiser.

    Args:
        model (`torch.nn.Module`): What trains; its parameters have shapes alone.
        args ([`AEGISConfig`]): Say which one.
        device (`"cuda"` or `"cpu"`): On a GPU PyTorch's own step on many tensors at a time.

    Raises:
        ValueError: If it is not one of [`PLANNED_OPTIMIZERS`].
    """
    name = OptimizerNames(args.optim)
    if name not in (*_TORCH, *_EIGHT_BIT):
        raise ValueError(f"optim: the memory of {name.value!r} is not known, expected one of {PLANNED_OPTIMIZERS}")
    made: Any
    options: dict[str, Any]
    made, options = Trainer.get_optimizer_cls_and_kwargs(args, model)  # type: ignore[arg-type]
    if device == "cuda" and made.__module__.startswith("torch.optim") and not options.get("fused"):
        options["foreach"] = True
    optimizer = made([p for p in model.parameters() if p.requires_grad], **options)
    if name in _EIGHT_BIT:
        _keep_embeddings_wide(model, optimizer)
    return optimizer


def _keep_embeddings_wide(model: nn.Module, optimizer: Any) -> None:
    """As the Trainer does, for this optimiser alone: its own way is a setting of the whole process."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    general = optimizer.get_config

    def config(gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        found = general(gindex, pindex, group)
        wide = id(optimizer.param_groups[gindex]["params"][pindex]) in embeddings
        return {**found, "optim_bits": 32} if wide else found

    optimizer.get_config = config
