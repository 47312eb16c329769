"""Reference directions: what gradient would restore the knowledge that a task gradient must not work against."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from hf_aegis.functional.bures import (
    DEFAULT_EPS,
    apply_penalty_gradient,
    penalty_gradient_coefficients,
    squared_wasserstein,
)
from hf_aegis.gradients.data_parallel import LayerMoments


if TYPE_CHECKING:
    from hf_aegis.anchors import ActivationAnchor


@dataclass
class LayerPenalty:
    """
    One layer's share of a penalty, and all that its closed-form gradient needs.

    Attributes:
        mean_term, std_term (`Tensor` of shape `()`): Unscaled distances of the means and of the standard deviations.
        mask (`Tensor` of shape `(B, T)`, *optional*): Which tokens count.
        shift, slope (`Tensor` of shape `(D,)`): The gradient is `mask * (shift + slope * hidden)`.
    """

    mean_term: Tensor
    std_term: Tensor
    mask: Tensor | None
    shift: Tensor
    slope: Tensor

    def cotangent(self, hidden: Tensor) -> Tensor:
        """Gradient of the penalty with respect to the layer's output, `(B, T, D)`."""
        return apply_penalty_gradient(hidden, self.mask, self.shift, self.slope)


def refuse_float16(index: int, hidden: Tensor) -> None:
    """
    Raises:
        ValueError: If the output `(B, T, D)` of decoder layer `index` is in float16.
    """
    if hidden.dtype == torch.float16:
        raise ValueError(
            f"the output of decoder layer {index} is in float16, in which the penalty's gradient would vanish: it is "
            "of the order of 1 / (tokens × width); use bfloat16, or float32"
        )


class ReferencePenalty(Protocol):
    """A penalty on each layer's output whose gradient is the reference direction."""

    def of(self, index: int, moments: LayerMoments, mask: Tensor | None) -> LayerPenalty:
        """
        The penalty of layer `index` and its closed-form gradient, by the moments of its output over the whole batch.
        `mask` `(B, T)` is that of this process's share of the batch.
        """
        ...

    def differentiable(
        self, index: int, hidden: Tensor, mask: Tensor | None, others: LayerMoments | None = None
    ) -> Tensor:
        """
        The same penalty, scaled, as a scalar with an autograd graph to this process's `hidden` `(B, T, D)`. `others`
        are the moments of the rest of the batch, where other processes have it.
        """
        ...


class TransportPenalty:
    r"""
    The static Wasserstein anchor's penalty, \\(\lambda \sum_l W_l\\) (arXiv 2604.16067, §3.2).

    Args:
        anchor ([`ActivationAnchor`]): Statistics of the pre-trained model, layer by layer.
        scale (`float`, *optional*, defaults to `1.0`): \\(\lambda\\).
        eps (`float`, *optional*, defaults to `1e-6`): Added to variances under the square root.
    """

    def __init__(self, anchor: "ActivationAnchor", scale: float = 1.0, eps: float = DEFAULT_EPS) -> None:
        self.anchor = anchor
        self.scale = scale
        self.eps = eps
        self._statistics: dict[tuple[int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def of(self, index: int, moments: LayerMoments, mask: Tensor | None) -> LayerPenalty:
        mean, variance, count = moments
        anchor_mean, anchor_variance = self._anchor_statistics(index, mean)
        terms = squared_wasserstein(mean, variance, anchor_mean, anchor_variance, self.eps)
        shift, slope = penalty_gradient_coefficients(mean, variance, count, anchor_mean, anchor_variance, self.eps)
        return LayerPenalty(*terms, mask, shift * self.scale, slope * self.scale)

    def differentiable(
        self, index: int, hidden: Tensor, mask: Tensor | None, others: LayerMoments | None = None
    ) -> Tensor:
        moments = LayerMoments.of(hidden, mask)
        mean, variance, _ = moments if others is None else moments.merged(others)
        mean_term, std_term = squared_wasserstein(mean, variance, *self._anchor_statistics(index, mean), self.eps)
        return self.scale * (mean_term + std_term)

    def _anchor_statistics(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        key = (index, like.device, like.dtype)
        if key not in self._statistics:
            self._statistics[key] = (
                self.anchor.mean[index].to(like.device, like.dtype),
                self.anchor.variance[index].to(like.device, like.dtype),
            )
        return self._statistics[key]
