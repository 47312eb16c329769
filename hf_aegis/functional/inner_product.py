"""Inner products of gradients, whatever their dtype."""

import torch
from torch import Tensor


# Bounds the float32 copies that the inner product of half-precision tensors is computed from.
_CHUNK = 1 << 24


def inner_product(first: Tensor, second: Tensor) -> Tensor:
    """Inner product of two tensors of one shape, accumulated in float32 or better."""
    first, second = first.reshape(-1), second.reshape(-1)
    if first.dtype == second.dtype and first.dtype in (torch.float32, torch.float64):
        return torch.dot(first, second)
    wide = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    total = first.new_zeros((), dtype=wide)
    for start in range(0, first.numel(), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        total += torch.dot(first[chunk].to(wide), second[chunk].to(wide))
    return total
