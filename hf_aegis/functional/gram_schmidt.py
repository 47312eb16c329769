"""One-sided Gram–Schmidt projection of a task gradient against a reference direction (arXiv 2604.16067, §3.3)."""

import torch
from torch import Tensor


def one_sided_coefficient(dot: Tensor, reference_squared_norm: Tensor, eps: float) -> Tensor:
    r"""
    The multiple of the reference direction that a conflicting task gradient loses.

    With \\(d = \langle g, r \rangle\\), \\(\alpha = \min(d, 0) / (\lVert r \rVert^2 + \epsilon)\\), so that
    \\(g' = g - \alpha r\\) leaves an agreeing gradient (\\(d \ge 0\\)) untouched and makes a conflicting one
    orthogonal to \\(r\\) up to \\(\langle g', r \rangle = d \epsilon / (\lVert r \rVert^2 + \epsilon)\\).

    Args:
        dot (`torch.Tensor`): Inner products \\(d\\), any shape.
        reference_squared_norm (`torch.Tensor`): \\(\lVert r \rVert^2\\), same shape as `dot`.
        eps (`float`): Damping \\(\epsilon > 0\\) in the denominator.

    Returns:
        `torch.Tensor`: \\(\alpha \le 0\\), same shape as `dot`; exactly zero where there is no conflict, where the
        reference is zero, and where either argument is not finite.
    """
    alpha = dot.clamp(max=0.0) / (reference_squared_norm + eps)
    return torch.where(torch.isfinite(dot) & torch.isfinite(alpha) & (dot < 0), alpha, torch.zeros_like(alpha))


def restoring_coefficient(task_squared_norm: Tensor, reference_squared_norm: Tensor, share: float) -> Tensor:
    r"""
    The multiple of the reference direction that makes up a `share` \\(\kappa\\) of the task gradient's length.

    With \\(\alpha = -\kappa \lVert g \rVert / \lVert r \rVert\\), \\(g - \alpha r\\) also descends along \\(r\\):
    after a one-sided projection its inner product with \\(r\\) is at least
    \\(\kappa \lVert g \rVert \lVert r \rVert\\). The scale of \\(r\\) has no part in it.

    Args:
        task_squared_norm, reference_squared_norm (`torch.Tensor`): Squared norms, one shape.
        share (`float`): \\(\kappa \ge 0\\).

    Returns:
        `torch.Tensor`: \\(\alpha \le 0\\), of the same shape; zero where the reference is zero, or either is not
        finite.
    """
    # One root each: the quotient of two squared norms would leave float32's range.
    alpha = -share * task_squared_norm.sqrt() / reference_squared_norm.sqrt()
    return torch.where(torch.isfinite(alpha), alpha, torch.zeros_like(alpha))


def shed_energy(dot: Tensor, task_squared_norm: Tensor, reference_squared_norm: Tensor, alpha: Tensor) -> Tensor:
    r"""
    Share of the task gradient's energy that the projection removes, \\(1 - \lVert g' \rVert^2 / \lVert g \rVert^2\\).

    Computed from scalars, \\(\lVert g' \rVert^2 = \lVert g \rVert^2 - 2 \alpha d + \alpha^2 \lVert r \rVert^2\\), and
    defined as zero for a zero gradient and where `alpha` is zero. All arguments share one shape; so does the result.
    """
    removed = 2.0 * alpha * dot - alpha.square() * reference_squared_norm
    positive = (task_squared_norm > 0) & (alpha != 0)
    return torch.where(positive, removed / torch.where(positive, task_squared_norm, 1.0), 0.0)


def project_one_sided(gradient: Tensor, reference: Tensor, eps: float = 1e-12) -> Tensor:
    r"""
    Projects one flat gradient off one flat reference direction where the two conflict.

    Args:
        gradient (`torch.Tensor` of shape `(N,)`): Task gradient \\(g\\).
        reference (`torch.Tensor` of shape `(N,)`): Direction \\(r\\) that must not be worked against.
        eps (`float`, *optional*, defaults to `1e-12`): Damping of the denominator.

    Returns:
        `torch.Tensor` of shape `(N,)`: \\(g'\\), in the dtype of `gradient`, computed in float32 or better. Zeros if
        `gradient` holds a value that is not finite; `gradient` itself if only `reference` does. Always finite.

    Raises:
        `ValueError`: If the two shapes differ.
    """
    if gradient.shape != reference.shape:
        raise ValueError(
            f"gradient and reference must have one shape, found {tuple(gradient.shape)} and {tuple(reference.shape)}"
        )
    if not torch.isfinite(gradient).all():
        return torch.zeros_like(gradient)
    wide = torch.promote_types(gradient.dtype, torch.float32)
    wide_gradient, wide_reference = gradient.to(wide), reference.to(wide)
    dot = torch.linalg.vecdot(wide_gradient.flatten(), wide_reference.flatten())
    squared_norm = torch.linalg.vecdot(wide_reference.flatten(), wide_reference.flatten())
    alpha = one_sided_coefficient(dot, squared_norm, eps)
    return gradient if alpha == 0 else (wide_gradient - alpha * wide_reference).to(gradient.dtype)
