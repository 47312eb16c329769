"""A model without its weights."""

import copy
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn


Model = TypeVar("Model", bound=nn.Module)


def without_values(model: Model, dtype: torch.dtype | None = None) -> Model:
    """
    A copy of a model whose parameters and buffers have the same shapes, on the CPU. Called in a `FakeTensorMode`, it
    takes no memory. Gradients are not copied, parameters that are shared stay so.

    Args:
        model (`torch.nn.Module`): On any device, `"meta"` included.
        dtype (`torch.dtype`, *optional*): That of the copy's floating-point parameters; by default their own.
    """
    known: dict[int, object] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        known[id(tensor)] = _like(tensor, dtype)
    return copy.deepcopy(model, known)


def _like(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    is_parameter = isinstance(tensor, nn.Parameter)
    if dtype is None or not is_parameter or not tensor.is_floating_point():
        dtype = tensor.dtype
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype)
    return nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
