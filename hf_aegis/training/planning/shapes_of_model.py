"""A model without its weights."""

import copy
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn


Model = TypeVar("Model", bound=nn.Module)


def without_values(model: Model) -> Model:
    """
    A copy of a model whose parameters and buffers have the same shapes, on the CPU. Called in a `FakeTensorMode`, it
    takes no memory. Gradients are not copied, parameters that are shared stay so.

    Args:
        model (`torch.nn.Module`): On any device, `"meta"` included.
    """
    known: dict[int, object] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        known[id(tensor)] = _like(tensor)
    return copy.deepcopy(model, known)


def _like(tensor: Tensor) -> Tensor:
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
