"""
Squared 2-Wasserstein (Bures) distance between diagonal Gaussians, and its gradient with respect to hidden states.

The gradient of one layer's distance is, per hidden dimension, an affine function of the hidden state:

    ∂W/∂H = m · (1/D) · [2 (μ - μ*) / N + 2 (s - s*) / (N s) · (H - μ)],    s = √(σ² + ε),    s* = √(σ*² + ε)

so two vectors of width D, computed from the batch statistics during the forward pass, are all that the backward pass
needs to remember beside the hidden states themselves.
"""

from torch import Tensor

from hf_aegis.functional.moments import check_mask


DEFAULT_EPS = 1e-6
"""ε under the square roots; keeps the distance smooth where a dimension hardly varies."""


def squared_wasserstein(
    mean: Tensor, variance: Tensor, anchor_mean: Tensor, anchor_variance: Tensor, eps: float = DEFAULT_EPS
) -> tuple[Tensor, Tensor]:
    """
    Transport distance between the statistics of a layer and its anchor (arXiv 2604.16067, transport penalty):
    `W = mean_d[(μ - μ*)²] + mean_d[(√(σ² + ε) - √(σ*² + ε))²]`. Differentiable.

    Args:
        mean, variance (`Tensor` of shape `(..., D)`):
            Statistics of the batch, see [`~functional.moments.masked_moments`].
        anchor_mean, anchor_variance (`Tensor` of shape `(..., D)`):
            Statistics of the anchor.
        eps (`float`, *optional*, defaults to `1e-6`):
            ε, not negative.

    Returns:
        `tuple[Tensor, Tensor]`: the mean term and the standard-deviation term; scalars for one layer, `(L,)` for
        stacked layers. Their sum is W.

    Raises:
        ValueError: if the shapes differ or `eps` is negative.
    """
    _check_statistics(mean, variance, anchor_mean, anchor_variance)
    if eps < 0:
        raise ValueError(f"eps must not be negative, found {eps}")
    mean_term = (mean - anchor_mean).square().mean(dim=-1)
    std_term = ((variance + eps).sqrt() - (anchor_variance + eps).sqrt()).square().mean(dim=-1)
    return mean_term, std_term


def penalty_gradient_coefficients(
    mean: Tensor,
    variance: Tensor,
    count: Tensor,
    anchor_mean: Tensor,
    anchor_variance: Tensor,
    eps: float = DEFAULT_EPS,
) -> tuple[Tensor, Tensor]:
    """
    The two vectors that make the gradient of [`squared_wasserstein`] an affine function of the hidden states:
    `∂W/∂H = m (shift + slope · H)`.

    To weight the penalty, or to normalise it otherwise, scale both vectors. When the statistics were reduced over
    several processes, `count` is the reduced count and the gradient applies to each process's own tokens.

    Args:
        mean, variance (`Tensor` of shape `(D,)`):
            Statistics of the batch.
        count (`Tensor` of shape `()`):
            Number of tokens N behind them; zero gives finite coefficients, which no token then uses.
        anchor_mean, anchor_variance (`Tensor` of shape `(D,)`):
            Statistics of the anchor.
        eps (`float`, *optional*, defaults to `1e-6`):
            ε, positive.

    Returns:
        `tuple[Tensor, Tensor]`: shift `(D,)` and slope `(D,)`, in the dtype of the statistics.

    Raises:
        ValueError: if the shapes differ or `eps` is not positive.
    """
    _check_statistics(mean, variance, anchor_mean, anchor_variance)
    if eps <= 0:
        raise ValueError(f"eps must be positive, or a constant dimension has no gradient; found {eps}")
    scale = 2.0 / (count.clamp(min=1) * mean.shape[-1])
    std = (variance + eps).sqrt()
    slope = scale * (1.0 - (anchor_variance + eps).sqrt() / std)
    shift = scale * (mean - anchor_mean) - slope * mean
    return shift, slope


def apply_penalty_gradient(hidden: Tensor, mask: Tensor | None, shift: Tensor, slope: Tensor) -> Tensor:
    """
    Evaluates `m (shift + slope · H)`; see [`penalty_gradient_coefficients`].

    Args:
        hidden (`Tensor` of shape `(B, T, D)`):
            Hidden states.
        mask (`Tensor` of shape `(B, T)`, *optional*):
            True (or non-zero) where a token counts. Masked tokens get exactly zero, whatever they hold.
        shift, slope (`Tensor` of shape `(D,)`):
            Coefficients, float32 or better; the arithmetic is done in their dtype.

    Returns:
        `Tensor` of shape `(B, T, D)`: the cotangent, in the dtype of `hidden`. It is of the order of 1 / (N D), which
        float16 rounds to zero for large batches; bfloat16 has float32's range.

    Raises:
        ValueError: if the shapes do not belong together.
    """
    check_mask(hidden, mask)
    if shift.shape != hidden.shape[-1:] or slope.shape != hidden.shape[-1:]:
        raise ValueError(
            f"hidden states of width {hidden.shape[-1]} need coefficients of shape ({hidden.shape[-1]},), "
            f"found shift {tuple(shift.shape)} and slope {tuple(slope.shape)}"
        )
    cotangent = (shift + slope * hidden.to(slope.dtype)).to(hidden.dtype)
    if mask is None:
        return cotangent
    return cotangent.masked_fill((mask == 0).to(hidden.device).unsqueeze(-1), 0.0)


def squared_wasserstein_gradient(
    hidden: Tensor,
    mask: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    count: Tensor,
    anchor_mean: Tensor,
    anchor_variance: Tensor,
    eps: float = DEFAULT_EPS,
) -> Tensor:
    """
    Gradient of W = mean term + standard-deviation term with respect to the hidden states, in closed form: no autograd
    graph of the penalty is needed.

    Args:
        hidden (`Tensor` of shape `(B, T, D)`):
            Hidden states.
        mask (`Tensor` of shape `(B, T)`, *optional*):
            True (or non-zero) where a token counts. Masked tokens get exactly zero.
        mean, variance, count (`Tensor` of shape `(D,)`, `(D,)` and `()`):
            What [`~functional.moments.masked_moments`] returned for `hidden` and `mask`.
        anchor_mean, anchor_variance (`Tensor` of shape `(D,)`):
            Statistics of the anchor.
        eps (`float`, *optional*, defaults to `1e-6`):
            ε, positive.

    Returns:
        `Tensor` of shape `(B, T, D)`: the gradient, in the dtype of `hidden`.

    Raises:
        ValueError: if the shapes do not belong together or `eps` is not positive.
    """
    shift, slope = penalty_gradient_coefficients(mean, variance, count, anchor_mean, anchor_variance, eps)
    return apply_penalty_gradient(hidden, mask, shift, slope)


def _check_statistics(mean: Tensor, variance: Tensor, anchor_mean: Tensor, anchor_variance: Tensor) -> None:
    shapes = {
        "mean": tuple(mean.shape),
        "variance": tuple(variance.shape),
        "anchor_mean": tuple(anchor_mean.shape),
        "anchor_variance": tuple(anchor_variance.shape),
    }
    if len(set(shapes.values())) != 1:
        raise ValueError(f"the statistics of a batch and of its anchor must have the same shape, found {shapes}")
