"""Low-rank experts from slices of a weight's spectrum (VLA-GSE, arXiv 2605.06175)."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor


BackboneAdjustment = Literal["expectation", "full", "none"]
BACKBONE_ADJUSTMENTS: tuple[BackboneAdjustment, ...] = get_args(BackboneAdjustment)


def expert_ranks(rank: int, num_experts: int) -> list[int]:
    """
    How a rank is shared out: as evenly as it goes, the first experts getting what is left over.

    Raises:
        ValueError: If there is less than a rank of one for each expert.
    """
    if not 1 <= num_experts <= rank:
        raise ValueError(f"each of {num_experts} experts needs a rank of at least 1, found {rank} for all of them")
    base, longer = divmod(rank, num_experts)
    return [base + 1] * longer + [base] * (num_experts - longer)


def spread_over_ranks(values: Tensor, rank: int) -> Tensor:
    """
    Repeats each expert's value for each of its ranks, as [`expert_ranks`] shares them out.

    Args:
        values (`Tensor` of shape `(..., E)`): One for each expert.
        rank (`int`): Of all experts together, R.

    Returns:
        `Tensor` of shape `(..., R)`. Its gradient is summed without atomic additions, so it is the same every time.
    """
    base, longer = divmod(rank, values.shape[-1])
    if not longer:
        return values.repeat_interleave(base, dim=-1)
    first = values[..., :longer].repeat_interleave(base + 1, dim=-1)
    return torch.cat((first, values[..., longer:].repeat_interleave(base, dim=-1)), dim=-1)


def plain_scales(ranks: list[int], in_features: int, eta: float) -> Tensor:
    r"""Scales \\(s_i = \sqrt{3 \eta \, d_{in} / r_i}\\) of experts with ranks \\(r_i\\): `(E,)`, in float64."""
    return torch.tensor([math.sqrt(3 * eta * in_features / rank) for rank in ranks], dtype=torch.float64)


def balanced_scales(singular_values: Tensor, ranks: list[int], base_scale: float) -> Tensor:
    r"""
    Gradient scale balancing: \\(s_j = s_{base} \, \operatorname{mean}_k(\operatorname{tr} S_k) / \operatorname{tr}
    S_j\\), so that experts of weaker slices do not get smaller gradients.

    Args:
        singular_values (`Tensor` of shape `(R,)`): Of all slices, one after another, positive.
        ranks (`list[int]`): How many belong to each.
        base_scale (`float`): \\(s_{base}\\).

    Returns:
        `Tensor` of shape `(E,)`.
    """
    traces = torch.stack([part.sum() for part in singular_values.split(ranks)])
    return base_scale * traces.mean() / traces


@dataclass(frozen=True)
class SpectralExperts:
    r"""
    What [`spectral_experts`] makes of a weight.

    Attributes:
        down (`Tensor` of shape `(R, N)`): \\(A\\) of all experts, stacked.
        up (`Tensor` of shape `(M, R)`): \\(B\\), side by side.
        scales (`Tensor` of shape `(E,)`): \\(s\\).
        backbone_down (`Tensor` of shape `(R, N)`, *optional*): With `backbone_up`, what is taken off the backbone.
        backbone_up (`Tensor` of shape `(M, R)`, *optional*): Its coefficients included.
    """

    down: Tensor
    up: Tensor
    scales: Tensor
    backbone_down: Tensor | None
    backbone_up: Tensor | None


def spectral_experts(
    left: Tensor,
    values: Tensor,
    right: Tensor,
    *,
    num_experts: int,
    num_generalized: int,
    rho: float,
    eta: float,
    base_scale: float | None,
    backbone_adjustment: BackboneAdjustment,
) -> SpectralExperts:
    r"""
    Experts and the adjustment of the backbone from a truncated SVD.

    The spectrum is cut into slices, the strongest for the generalized experts. With \\(A_i = \operatorname{diag}
    (\sqrt{S_i / (s_i \rho)}) V_i^T\\) and \\(B_i = U_i \operatorname{diag}(\sqrt{S_i / (s_i \rho)})\\) each expert
    starts at \\(s_i B_i A_i = U_i S_i V_i^T / \rho\\). What they add is taken off the backbone:
    \\(\frac{1}{\rho} [\frac{1}{n_g} \sum_g U_g S_g V_g^T + c \sum_j U_j S_j V_j^T]\\), where \\(c = 1 / n_s\\)
    (`"expectation"`) keeps the output in expectation under uniform routing, and \\(c = 1\\) (`"full"`) is what the
    authors' code does.

    Args:
        left (`Tensor` of shape `(M, R)`): U.
        values (`Tensor` of shape `(R,)`): S, largest first, positive.
        right (`Tensor` of shape `(R, N)`): V transposed.
        num_experts (`int`): E, generalized and specialized.
        num_generalized (`int`): \\(n_g\\), the always active; \\(n_s = E - n_g\\).
        rho (`float`): \\(\rho\\), what the slices are divided by.
        eta (`float`): \\(\eta\\), in \\(s_i = \sqrt{3 \eta N / r_i}\\).
        base_scale (`float`, *optional*): \\(s_{base}\\) of the specialized experts, see [`balanced_scales`]; `None`
            gives them the scales of the generalized ones.
        backbone_adjustment (`"expectation"`, `"full"` or `"none"`): Which \\(c\\), or nothing taken off.

    Returns:
        [`SpectralExperts`]: in the dtype of `values`.

    Raises:
        ValueError: If there are fewer ranks than experts.
    """
    rank, num_routed = len(values), num_experts - num_generalized
    ranks = expert_ranks(rank, num_experts)
    scales = plain_scales(ranks, right.shape[1], eta).to(values)
    if num_routed and base_scale is not None:
        routed = values[sum(ranks[:num_generalized]) :]
        scales = torch.cat((scales[:num_generalized], balanced_scales(routed, ranks[num_generalized:], base_scale)))
    root = (values / (rho * spread_over_ranks(scales, rank))).sqrt()
    backbone_down = backbone_up = None
    if backbone_adjustment != "none":
        shares = torch.ones_like(scales)
        shares[:num_generalized] /= max(num_generalized, 1)
        if backbone_adjustment == "expectation":
            shares[num_generalized:] /= max(num_routed, 1)
        backbone_root = (values / rho).sqrt()
        backbone_down = backbone_root[:, None] * right
        backbone_up = left * (backbone_root * spread_over_ranks(shares, rank))
    return SpectralExperts(root[:, None] * right, left * root, scales, backbone_down, backbone_up)
