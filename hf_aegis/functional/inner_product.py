"""Inner products of gradients, whatever their dtype and size."""

import torch
from torch import Tensor


# Elements that are multiplied at once. A CPU adds up a dot product in few accumulators: one of 10⁸ terms of one sign
# comes out 0.4 % short in float32. Elsewhere sums are trees, and what is bounded is the copies in float32.
_CPU_CHUNK = 1 << 18
_CHUNK = 1 << 24


def inner_product(first: Tensor, second: Tensor) -> Tensor:
    """
    Inner product of two tensors of one shape, in float32 or better.

    However large they are, its error is a few dozen roundings of the sum of the products' absolute values: that of a
    squared norm is relative to itself, and that of another product to `‖first‖ ‖second‖`.

    Args:
        first, second (`Tensor`): Of one shape and device, and any floating-point dtypes.

    Returns:
        `Tensor` of shape `()`: in float32, or float64 if either tensor is.
    """
    wide = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    size = _CPU_CHUNK if first.device.type == "cpu" else _CHUNK
    chunks = zip(first.reshape(-1).split(size), second.reshape(-1).split(size), strict=True)
    parts = [torch.dot(left.to(wide), right.to(wide)) for left, right in chunks]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()
