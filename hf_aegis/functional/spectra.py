"""How concentrated a matrix's energy is in its leading singular directions (arXiv 2604.16067, spectral analysis)."""

import torch
from torch import Tensor


def concentration_ratio(singular_values: Tensor, k: int) -> Tensor:
    r"""
    Share of a matrix's energy that its leading singular directions hold,
    \\(\rho_k = \sum_{i \le k} s_i^2 / \sum_i s_i^2\\).

    One for a matrix of rank \\(k\\) or less, \\(k / R\\) for a flat spectrum of \\(R\\) values.

    Args:
        singular_values (`torch.Tensor` of shape `(..., R)`): Not negative, largest first.
        k (`int`): How many of them lead.

    Returns:
        `torch.Tensor` of shape `(...)`: between 0 and 1; NaN where all singular values are zero, which have no energy
        to share.

    Raises:
        ValueError: If `k` does not lie between 1 and `R`.
    """
    count = singular_values.shape[-1]
    if not 1 <= k <= count:
        raise ValueError(f"k must lie between 1 and the {count} singular values, found {k}")
    # Relative to the largest, so that the squares of tiny gradients do not vanish.
    energy = (singular_values / singular_values.amax(dim=-1, keepdim=True)).square()
    return torch.where(singular_values[..., 0] > 0, energy[..., :k].sum(-1) / energy.sum(-1), torch.nan)
