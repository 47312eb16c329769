"""How far two anchors of the same base are from each other."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_aegis.functional.bures import squared_wasserstein


if TYPE_CHECKING:
    from hf_aegis.anchors.anchor import ActivationAnchor


def layer_distances(first: "ActivationAnchor", second: "ActivationAnchor") -> Tensor:
    """
    Squared 2-Wasserstein distance of each layer's moments, per hidden dimension.

    Returns:
        `Tensor` of shape `(2, L)`: the terms of means and of standard deviations, in float64, on the CPU.

    Raises:
        AnchorMismatchError: if the two are of different models; every such field is named.
    """
    first.fingerprint.check_same_base(second.fingerprint)
    terms = squared_wasserstein(
        first.mean.double().cpu(),
        first.variance.double().cpu(),
        second.mean.double().cpu(),
        second.variance.double().cpu(),
        eps=0.0,
    )
    return torch.stack(terms)
