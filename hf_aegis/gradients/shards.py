"""Tensors that FSDP2 has spread over processes, and the part of them that one process has."""

from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def local_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in the same memory; the tensor itself where it is not spread."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def reshard(model: nn.Module) -> None:
    """
    Drops the whole weights that FSDP2 keeps after a forward pass without a backward pass. While they are there the
    model's parameters are those, and the next forward pass uses them, whatever happened to the shards.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def own_part(whole: Tensor, like: Tensor) -> Tensor:
    """
    This process's part of what all processes have whole. Nothing is communicated.

    Args:
        whole (`Tensor`): The same in all processes; its first dimension, at least, is that of `like`.
        like (`Tensor`): Says how it is placed.

    Returns:
        `Tensor`: In memory of its own; where `like` is not spread, `whole` on its device.
    """
    if not isinstance(like, DTensor):
        return whole.to(like.device)
    placed: Any = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    return placed.to_local().clone()


def gathered(part: Tensor, like: Tensor) -> Tensor:
    """
    The whole of which each process has a part. All processes have to call it.

    Args:
        part (`Tensor`): This process's part.
        like (`Tensor`): Of the whole's shape; says how it is placed.

    Returns:
        `Tensor`: `part` itself where `like` is not spread.
    """
    if not isinstance(like, DTensor):
        return part
    placed = DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
    return placed.full_tensor()


def as_whole(value: Tensor) -> Tensor:
    """A tensor whole, such as a norm of spread gradients. All processes have to call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value
