"""Histograms of the cosine between task gradient and reference direction, neuron by neuron (arXiv 2604.16067, §5)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_aegis.json_files import require_keys


class NeuronCosines:
    r"""
    Counts, per projection group, how the cosines of single output neurons,
    \\(\langle g_i, r_i \rangle / (\lVert g_i \rVert \lVert r_i \rVert)\\), are spread over \\([-1, 1]\\). Neuron
    \\(i\\) is row \\(i\\) of a weight with at least two dimensions (of an embedding, a token); biases and norm
    weights have none. Neurons of which either gradient is zero or not finite are not counted.

    ```python
    shield.observer = cosines.observe
    ```

    Args:
        bins (`int`, *optional*, defaults to 200): Number of bins of equal width.

    Raises:
        ValueError: If there is not at least one bin.
    """

    def __init__(self, bins: int = 200) -> None:
        if bins < 1:
            raise ValueError(f"bins must be at least 1, found {bins}")
        self.bins = bins
        self._counts: dict[str, Tensor] = {}

    @torch.no_grad()
    def observe(self, group: str, gradient: Tensor, reference: Tensor) -> None:
        """
        Counts the neurons of one parameter.

        Args:
            group (`str`): The parameter's projection group.
            gradient, reference (`Tensor` of shape `(out, ...)`): Its task gradient and its reference direction.
        """
        if gradient.dim() < 2:
            return
        wide = torch.promote_types(gradient.dtype, torch.float32)
        task, other = gradient.flatten(1).to(wide), reference.flatten(1).to(wide)
        # One norm after the other: their product would leave float32's range.
        cosine = torch.linalg.vecdot(task / task.norm(dim=1, keepdim=True), other / other.norm(dim=1, keepdim=True))
        index = ((cosine.clamp(-1, 1) + 1) * (self.bins / 2)).nan_to_num(self.bins + 1).long()
        # The last bin includes its upper edge; a further one takes what has no cosine, and is then left out.
        index = torch.where(index > self.bins, self.bins, index.clamp(max=self.bins - 1))
        counts = torch.bincount(index, minlength=self.bins + 1)[: self.bins]
        known = self._counts.get(group)
        self._counts[group] = counts if known is None else known.to(counts.device) + counts

    def to_dict(self) -> dict[str, Any]:
        """`edges`, the `bins + 1` edges from -1 to 1, and `counts`, a list of `bins` integers for each group."""
        edges = [2 * index / self.bins - 1 for index in range(self.bins + 1)]
        return {"edges": edges, "counts": {group: counts.tolist() for group, counts in self._counts.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        """
        Goes on from the counts of an earlier `to_dict()`; those so far are forgotten.

        Raises:
            ValueError: If they are no counts, or have another number of bins; the group is named.
        """
        for group, counts in require_keys(state, {"counts": dict}, "cosines of neurons")["counts"].items():
            if not isinstance(counts, list) or not all(type(count) is int and 0 <= count < 2**63 for count in counts):
                raise ValueError(f"counts of {group!r} are {counts!r:.80}, expected a list of counts")
            if len(counts) != self.bins:
                raise ValueError(f"counts of {group!r} have {len(counts)} bins, expected {self.bins}")
        self._counts = {group: torch.tensor(counts) for group, counts in state["counts"].items()}
