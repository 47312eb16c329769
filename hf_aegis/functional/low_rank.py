"""Products of two thin factors."""

import torch
from torch import Tensor


def product_singular_values(up: Tensor, down: Tensor) -> Tensor:
    """
    Singular values of a product, from triangles of its factors, without making it.

    Args:
        up (`Tensor` of shape `(M, R)`): The left factor.
        down (`Tensor` of shape `(R, N)`): The right factor, of the same dtype.

    Returns:
        `Tensor` of shape `(min(M, R, N),)`: Largest first, without gradient; in float32 or better.
    """
    wide = torch.promote_types(up.dtype, torch.float32)
    left = torch.linalg.qr(up.detach().to(wide), mode="r")[1]
    right = torch.linalg.qr(down.detach().mT.to(wide), mode="r")[1]
    return torch.linalg.svdvals(left @ right.mT)
