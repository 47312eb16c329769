"""Random gradients of predictions, whose second moments are the Gauss-Newton matrix, and the pairs that hold most."""

from collections.abc import Sequence

import torch
from torch import Tensor


def predictive_cotangent(logits: Tensor, noise: Tensor, temperature: float = 1.0) -> Tensor:
    r"""
    Gradient, with respect to the logits \\(\ell\\), of \\(\sum_c \epsilon_c \sqrt{q_c} (\ell_c - \sum_{c'} q_{c'}
    \ell_{c'})\\) with \\(q = \mathrm{softmax}(\ell / T)\\) held fixed:
    \\(\epsilon_c \sqrt{q_c} - q_c \sum_{c'} \epsilon_{c'} \sqrt{q_{c'}}\\).

    For standard normal noise its second moments are \\(\mathrm{diag}(q) - q q^T\\): \\(T^2\\) times the Hessian
    of \\(\mathrm{KL}(q \| \mathrm{softmax}(\ell / T))\\) in the logits, so that gradients which are computed from it
    have the Gauss-Newton matrix of the predictions at temperature T for their second moments (Martens & Grosse 2015,
    arXiv 1503.05671, for T = 1). A temperature above one keeps it from vanishing where a model is certain.

    Args:
        logits (`Tensor` of shape `(..., V)`): The predictions.
        noise (`Tensor` of shape `(..., V)`): \\(\epsilon\\).
        temperature (`float`, *optional*, defaults to 1.0): T, above 0.

    Returns:
        `Tensor` of shape `(..., V)`: the gradient, detached, in the noise's dtype. It adds up to zero over the
        vocabulary.

    Raises:
        ValueError: If the shapes differ or the temperature is not above 0.
    """
    if logits.shape != noise.shape:
        raise ValueError(
            f"logits and noise must have the same shape, found {tuple(logits.shape)} and {tuple(noise.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, found {temperature}")
    q = (logits.detach().to(noise.dtype) / temperature).softmax(dim=-1)
    weighted = noise * q.sqrt()
    return weighted - q * weighted.sum(dim=-1, keepdim=True)


def threshold_for_share(values: Sequence[Tensor], share: float) -> float:
    """
    The largest threshold such that the values not below it hold a share of the sum over all tensors.

    Args:
        values (`Sequence[Tensor]`): Of any shapes, not negative.
        share (`float`): Above 0 and at most 1.

    Returns:
        `float`: one of the values, and above zero: values of zero are never needed.

    Raises:
        ValueError: If `share` is out of range, a value is negative or not finite, or none is above zero.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, found {share}")
    everything = torch.cat([tensor.detach().cpu().double().flatten() for tensor in values])
    if not bool(torch.isfinite(everything).all()) or bool((everything < 0).any()):
        raise ValueError("values that a share is taken of must be finite and not negative")
    positive = everything[everything > 0].sort(descending=True).values
    if len(positive) == 0:
        raise ValueError("no value is above zero: there is nothing to take a share of")
    held = positive.cumsum(dim=0)
    # Relative to the same sum, so that rounding cannot ask for more than there is.
    needed = int((held < share * held[-1]).sum())
    return float(positive[needed])
