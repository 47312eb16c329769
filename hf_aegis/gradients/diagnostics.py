"""What a projected backward pass did, per group and in total (arXiv 2604.16067, §4 and appendix B)."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_aegis.functional.gram_schmidt import shed_energy


@dataclass
class ProjectionReport:
    r"""
    Scalars of one backward pass. Everything stays on the device until it is read. Where a gradient or a reference was
    not finite, neither are its figures, nor the totals.

    Attributes:
        groups (`list[str]`): Names of the \\(G\\) groups that had a task gradient.
        dot (`Tensor` of shape `(G,)`): \\(\langle g, r \rangle\\).
        task_squared_norm (`Tensor` of shape `(G,)`): \\(\lVert g \rVert^2\\), before projection.
        reference_squared_norm (`Tensor` of shape `(G,)`): \\(\lVert r \rVert^2\\).
        alpha (`Tensor` of shape `(G,)`): Projection coefficient, zero where there was no conflict.
        mean_term, std_term (`Tensor` of shape `(L,)`):
            Each layer's transport distance, split into means and standard deviations; not scaled.
        penalty_scale (`float`): \\(\lambda\\).
        dropped (`list[str]`): Groups whose gradients were removed because they were not finite.
    """

    groups: list[str]
    dot: Tensor
    task_squared_norm: Tensor
    reference_squared_norm: Tensor
    alpha: Tensor
    mean_term: Tensor
    std_term: Tensor
    penalty_scale: float
    dropped: list[str] = field(default_factory=list)

    @property
    def cosine(self) -> Tensor:
        """Cosine between task gradient and reference direction per group, `(G,)`; zero where either vanishes."""
        # One root each: the product of two squared norms would leave float32's range.
        norms = self.task_squared_norm.sqrt() * self.reference_squared_norm.sqrt()
        return torch.where(norms == 0, 0.0, self.dot / torch.where(norms == 0, 1.0, norms))

    @property
    def energy_shed(self) -> Tensor:
        """Share of each group's gradient energy that was removed, `(G,)`."""
        return shed_energy(self.dot, self.task_squared_norm, self.reference_squared_norm, self.alpha)

    def is_finite(self) -> Tensor:
        """Which groups have a finite task gradient, boolean `(G,)`."""
        return torch.isfinite(self.task_squared_norm)

    def summary(self) -> dict[str, float]:
        """
        The step's figures, ready to be logged: `throttle_rate` (share of groups in conflict), `energy_shed` (over all
        groups together), `cosine` and `alpha` (means over groups), `penalty` (scaled) with its `penalty_mean_term` and
        `penalty_std_term`, and the norms `vlm_grad_norm` (before) and `vlm_grad_norm_projected` (after projection).
        """
        if not self.groups:
            return {}
        total = self.task_squared_norm.sum()
        removed = (self.energy_shed * self.task_squared_norm).sum()
        values = torch.stack(
            [
                (self.dot < 0).float().mean(),
                torch.where(total == 0, 0.0, removed / torch.where(total == 0, 1.0, total)),
                self.cosine.mean(),
                self.alpha.mean(),
                self.penalty_scale * (self.mean_term.sum() + self.std_term.sum()),
                self.penalty_scale * self.mean_term.sum(),
                self.penalty_scale * self.std_term.sum(),
                total.sqrt(),
                (total - removed).clamp(min=0).sqrt(),
            ]
        ).tolist()
        names = (
            "throttle_rate",
            "energy_shed",
            "cosine",
            "alpha",
            "penalty",
            "penalty_mean_term",
            "penalty_std_term",
            "vlm_grad_norm",
            "vlm_grad_norm_projected",
        )
        return dict(zip(names, values, strict=True))

    def per_group(self) -> dict[str, Any]:
        """Lists over groups and layers, ready for a JSON line."""
        return {
            "groups": list(self.groups),
            "dropped": list(self.dropped),
            "dot": self.dot.tolist(),
            "cosine": self.cosine.tolist(),
            "alpha": self.alpha.tolist(),
            "energy_shed": self.energy_shed.tolist(),
            "task_norm": self.task_squared_norm.sqrt().tolist(),
            "reference_norm": self.reference_squared_norm.sqrt().tolist(),
            "penalty_mean_term": self.mean_term.tolist(),
            "penalty_std_term": self.std_term.tolist(),
        }
