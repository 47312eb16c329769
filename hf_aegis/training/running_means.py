"""Means of figures that training steps yield, read from the device only when they are logged."""

from collections.abc import Callable

import torch
from torch import Tensor


class RunningMeans:
    """Weighted means by name since the last time they were read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}

    def add(self, name: str, value: Tensor, weight: float = 1.0) -> None:
        """Takes in a scalar, whose graph it drops."""
        value = value.detach().float() * weight
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._weights[name] = self._weights.get(name, 0.0) + weight

    def read(self, total: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> dict[str, float]:
        """The means since the last call, and a new beginning. `total` sums a tensor over processes."""
        means = {}
        for name, value in self._sums.items():
            summed, weight = total(torch.stack([value, torch.full_like(value, self._weights[name])])).tolist()
            means[name] = summed / weight
        self.clear()
        return means

    def clear(self) -> None:
        """A new beginning, without reading anything."""
        self._sums, self._weights = {}, {}
