"""Symmetric ways to make one update of two gradients that may conflict: PCGrad and GradDrop."""

import torch
from torch import Tensor

from hf_aegis.functional.gram_schmidt import one_sided_coefficient


def pcgrad_coefficients(
    dot: Tensor, task_squared_norm: Tensor, reference_squared_norm: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    r"""
    Coefficients of PCGrad for two gradients (arXiv 2001.06782, algorithm 1): where \\(d = \langle g, r \rangle < 0\\),
    each is projected off the *original* other one, and the two are added,
    \\(g' = (g - \alpha r) + (r - \beta g)\\).

    Args:
        dot (`torch.Tensor`): Inner products \\(d\\), any shape.
        task_squared_norm, reference_squared_norm (`torch.Tensor`): Squared norms of \\(g\\) and \\(r\\), same shape.
        eps (`float`): Damping \\(\epsilon > 0\\) of both denominators.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: \\(\alpha = d / (\lVert r \rVert^2 + \epsilon)\\) and
        \\(\beta = d / (\lVert g \rVert^2 + \epsilon)\\); exactly zero where there is no conflict or an argument is not
        finite.
    """
    return (
        one_sided_coefficient(dot, reference_squared_norm, eps),
        one_sided_coefficient(dot, task_squared_norm, eps),
    )


def drop_by_sign(task: Tensor, reference: Tensor, uniform: Tensor) -> Tensor:
    r"""
    GradDrop for two gradients (arXiv 2010.06808, algorithm 1, without leak): element by element, with the positive
    sign purity \\(P = \frac{1}{2} (1 + (g + r) / (|g| + |r|))\\), the positive ones are kept where \\(P > U\\) and
    the negative ones where \\(P < U\\), and what is kept is added.

    Args:
        task, reference (`torch.Tensor`): \\(g\\) and \\(r\\), one shape.
        uniform (`torch.Tensor`): \\(U\\), drawn uniformly from \\([0, 1)\\), same shape.

    Returns:
        `torch.Tensor`: The sum of what is kept; zero where both are zero. Where the two have one sign, it is their
        sum (but for negative ones where \\(U\\) is exactly zero).
    """
    size = task.abs() + reference.abs()
    # Both are zero where the size is, and nothing is there to be kept.
    purity = 0.5 * (1.0 + (task + reference) / torch.where(size == 0, 1.0, size))
    keep_positive, keep_negative = purity > uniform, purity < uniform
    kept = torch.zeros_like(size)
    for gradient in (task, reference):
        kept += torch.where((keep_positive & (gradient > 0)) | (keep_negative & (gradient < 0)), gradient, 0.0)
    return kept
