"""
Weight interpolation between a pre-trained and a fine-tuned model (WiSE-FT, arXiv 2109.01903): by a given share, or by
as much as what is to be kept allows.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import Parameter


STEPS = 16
"""Shares that are looked at are multiples of one part in so many."""


class WeightPath:
    r"""
    The straight path from pre-trained weights to fine-tuned ones, \\((1 - w)\,\theta^* + w\,\theta\\).

    Args:
        fine_tuned (`Mapping[str, torch.nn.Parameter]`):
            \\(\theta\\) by name; what moves along the path. A copy of it is kept.
        pretrained (`Mapping[str, Tensor]`): \\(\theta^*\\) by the same names.

    Raises:
        ValueError: If a name is missing.
    """

    def __init__(self, fine_tuned: Mapping[str, Parameter], pretrained: Mapping[str, Tensor]):
        if missing := sorted(fine_tuned.keys() - pretrained.keys()):
            raise ValueError(f"no pre-trained weights of {missing[0]!r}")
        self._parameters = fine_tuned
        self._starts = pretrained
        self._ends = {name: parameter.detach().clone() for name, parameter in fine_tuned.items()}

    @torch.no_grad()
    def go_to(self, share: float) -> None:
        r"""
        Sets each parameter, in place; at 0 and at 1 to the bit.

        Args:
            share (`float`): \\(w\\), from 0 (pre-trained) to 1 (fine-tuned).

        Raises:
            ValueError: If the share is not in [0, 1].
        """
        if not 0 <= share <= 1:
            raise ValueError(f"the share of the fine-tuned weights must lie in [0, 1], found {share}")
        for name, parameter in self._parameters.items():
            end = self._ends[name]
            parameter.copy_(torch.lerp(self._starts[name].to(end), end, share))

    def keep_within(self, loss: Callable[[], float], tolerance: float) -> float:
        """
        Goes as far as a loss allows: to the largest of seventeen evenly spaced shares at which it is at most
        `(1 + tolerance)` times that of the pre-trained weights, by bisection, as if the loss only grew on the way.

        Args:
            loss (`Callable[[], float]`): Measures the model as it is, e.g. by questions that it could answer.
            tolerance (`float`): Relative to the pre-trained weights' loss; not negative.

        Returns:
            `float`: The share gone to. The loss was measured there (not only before and beyond) and is within bounds.

        Raises:
            ValueError: If the tolerance is negative.
        """
        if not tolerance >= 0:
            raise ValueError(f"the tolerance must not be negative, found {tolerance}")
        self.go_to(1.0)
        at_end = loss()
        self.go_to(0.0)
        limit = (1 + tolerance) * loss()
        # The loss is within the limit at `near`, and beyond it at `far`.
        near, far = (STEPS, STEPS + 1) if at_end <= limit else (0, STEPS)
        while far - near > 1:
            middle = (near + far) // 2
            self.go_to(middle / STEPS)
            near, far = (middle, far) if loss() <= limit else (near, middle)
        self.go_to(near / STEPS)
        return near / STEPS
