"""Weight interpolation between a pre-trained and a fine-tuned model (WiSE-FT, arXiv 2109.01903)."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter


@torch.no_grad()
def interpolate_weights(fine_tuned: Mapping[str, Parameter], pretrained: Mapping[str, Tensor], share: float) -> None:
    r"""
    Sets each parameter to \\((1 - w)\,\theta^* + w\,\theta\\), in place.

    Args:
        fine_tuned (`Mapping[str, torch.nn.Parameter]`): \\(\theta\\) by name.
        pretrained (`Mapping[str, Tensor]`): \\(\theta^*\\) by the same names.
        share (`float`): \\(w\\), from 0 (pre-trained) to 1 (fine-tuned).

    Raises:
        ValueError: If the share is not in [0, 1], or a name is missing.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share of the fine-tuned weights must lie in [0, 1], found {share}")
    if missing := sorted(fine_tuned.keys() - pretrained.keys()):
        raise ValueError(f"no pre-trained weights of {missing[0]!r}")
    for name, parameter in fine_tuned.items():
        parameter.copy_(torch.lerp(pretrained[name].to(parameter), parameter, share))
