"""Masked first and second moments of hidden states, and how moments of disjoint token sets merge."""

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """
    Mergeable moments of a set of tokens, per hidden dimension.

    Attributes:
        count (`Tensor` of shape `()`):
            Number of tokens.
        mean (`Tensor` of shape `(D,)`):
            Mean over the tokens.
        m2 (`Tensor` of shape `(D,)`):
            Sum of squared deviations from the mean, so that `m2 / count` is the population variance.
    """

    count: Tensor  # type: ignore[assignment]
    mean: Tensor
    m2: Tensor

    @property
    def variance(self) -> Tensor:
        """Population variance, `(D,)`; zeros where no token was counted."""
        return self.m2 / self.count.clamp(min=1)


def check_mask(hidden: Tensor, mask: Tensor | None) -> None:
    """
    Refuses shapes that do not belong together. Looks at shapes only, so it never waits for the device.

    Args:
        hidden (`Tensor` of shape `(B, T, D)`):
            Hidden states.
        mask (`Tensor` of shape `(B, T)`, *optional*):
            True (or non-zero) where a token counts.

    Raises:
        ValueError: if `hidden` is not a floating-point `(B, T, D)` tensor or `mask` is not `(B, T)`.
    """
    if hidden.dim() != 3 or not hidden.is_floating_point():
        raise ValueError(
            "hidden states must be a floating-point (batch, tokens, width) tensor, "
            f"found shape {tuple(hidden.shape)} of {hidden.dtype}"
        )
    if mask is not None and mask.shape != hidden.shape[:2]:
        raise ValueError(
            f"the attention mask has shape {tuple(mask.shape)}, but the hidden states {tuple(hidden.shape)} "
            f"need {tuple(hidden.shape[:2])}"
        )


def masked_moments(hidden: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """
    Mean and population variance of hidden states over the unmasked tokens (arXiv 2604.16067, static Wasserstein
    anchor): `mean = (1/N) Σ m H`, `variance = (1/N) Σ m (H - mean)²`.

    Two passes, in float32 or better (float64 stays float64). What masked positions hold, NaN included, has no
    influence. Differentiable. Nothing here waits for the device, so a mask without a single token cannot be an error:
    it gives a count of zero and moments of zero, and callers that can afford it check the count.

    Args:
        hidden (`Tensor` of shape `(B, T, D)`):
            Hidden states.
        mask (`Tensor` of shape `(B, T)`, *optional*):
            True (or non-zero) where a token counts; all tokens by default.

    Returns:
        `tuple[Tensor, Tensor, Tensor]`: mean `(D,)`, variance `(D,)` and the number of tokens `()`, all in float32
        (float64 for float64 input).

    Raises:
        ValueError: if `hidden` is not a floating-point `(B, T, D)` tensor or `mask` is not `(B, T)`.
    """
    check_mask(hidden, mask)
    values = hidden if hidden.dtype == torch.float64 else hidden.float()
    if mask is None:
        count = values.new_full((), hidden.shape[0] * hidden.shape[1])
        keep = None
    else:
        keep = (mask != 0).to(values.device).unsqueeze(-1)
        count = keep.sum(dtype=values.dtype)
        values = values.masked_fill(~keep, 0.0)
    tokens = count.clamp(min=1)
    mean = values.sum(dim=(0, 1)) / tokens
    deviations = values - mean
    if keep is not None:
        deviations = deviations.masked_fill(~keep, 0.0)
    variance = deviations.square().sum(dim=(0, 1)) / tokens
    return mean, variance, count


@torch.no_grad()
def token_moments(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """
    Mean and population variance of tokens that all count: what [`masked_moments`] gives for them, to rounding, without
    a graph and in a few passes over the memory.

    Args:
        tokens (`Tensor` of shape `(N, D)`): Of a floating-point dtype; N of 0 gives NaN.

    Returns:
        `tuple[Tensor, Tensor]`: mean `(D,)` and variance `(D,)`, in float32 (float64 for float64 input).
    """
    values = tokens if tokens.dtype == torch.float64 else tokens.float()
    mean = values.mean(dim=0)
    return mean, (values - mean).square_().mean(dim=0)


def merge_moments(first: Moments, second: Moments) -> Moments:
    """
    Moments of the union of two disjoint token sets (Chan, Golub & LeVeque, 1979). Stable where the mean is large
    against the spread, unlike sums of squares; the result has the wider of the two dtypes.

    Args:
        first, second ([`Moments`]):
            Moments with the same width. A leading layer dimension, with counts `(L, 1)`, works as well.

    Returns:
        [`Moments`]: the merged moments.

    Raises:
        ValueError: if the widths differ.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(
            f"moments of different widths do not merge: {tuple(first.mean.shape)} and {tuple(second.mean.shape)}"
        )
    count = first.count + second.count
    share = second.count / count.clamp(min=1)
    delta = second.mean - first.mean
    return Moments(
        count=count,
        mean=first.mean + delta * share,
        m2=first.m2 + second.m2 + delta.square() * (first.count * share),
    )
