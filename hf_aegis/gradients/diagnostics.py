"""What a projected backward pass did, per group and in total (arXiv 2604.16067, §4 and appendix B)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from hf_aegis.functional.gram_schmidt import shed_energy
from hf_aegis.gradients.reference import LayerPenalty


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
            Each layer's transport distance, split into means and standard deviations; not scaled. Empty where the
            reference is no transport penalty.
        penalty_scale (`float`): \\(\lambda\\).
        dropped (`list[str]`): Groups whose gradients were removed because they were not finite.
        replay_loss (`float` or `Tensor` of shape `()`, *optional*): The loss whose gradient was the reference.
        update_squared_norm (`Tensor` of shape `(G,)`, *optional*):
            \\(\lVert g' \rVert^2\\) of what was made of both gradients, where it is more than \\(g - \alpha r\\).
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
    replay_loss: float | Tensor | None = None
    update_squared_norm: Tensor | None = None

    @classmethod
    def of(cls, groups: list[str], scalars: Tensor, penalties: Sequence[LayerPenalty], penalty_scale: float) -> Self:
        """
        The report of a backward pass projected against the transport penalty.

        Args:
            groups (`list[str]`): The groups' names.
            scalars (`Tensor` of shape `(G, 4)`): Inner products, both squared norms, coefficients.
            penalties (`Sequence[LayerPenalty]`): Those of the layers that the gradient came through.
            penalty_scale (`float`): What they were scaled by.
        """
        terms = [torch.stack([p.mean_term, p.std_term]) for p in penalties]
        mean_term, std_term = torch.stack(terms, dim=1) if terms else torch.zeros(2, 0)
        dot, task, reference, alpha = scalars.unbind(dim=1)
        return cls(groups, dot, task, reference, alpha, mean_term, std_term, penalty_scale)

    @property
    def cosine(self) -> Tensor:
        """Cosine between task gradient and reference direction per group, `(G,)`; zero where either vanishes."""
        # One root each: the product of two squared norms would leave float32's range.
        norms = self.task_squared_norm.sqrt() * self.reference_squared_norm.sqrt()
        return torch.where(norms == 0, 0.0, self.dot / torch.where(norms == 0, 1.0, norms))

    @property
    def energy_shed(self) -> Tensor:
        """
        Share of each group's gradient energy that was removed, `(G,)`; negative where a combiner adds energy of the
        reference gradient.
        """
        if self.update_squared_norm is not None:
            positive = self.task_squared_norm > 0
            share = self.update_squared_norm / torch.where(positive, self.task_squared_norm, 1.0)
            return torch.where(positive, 1.0 - share, 0.0)
        return shed_energy(self.dot, self.task_squared_norm, self.reference_squared_norm, self.alpha)

    def is_finite(self) -> Tensor:
        """Which groups have a finite task gradient, boolean `(G,)`."""
        return torch.isfinite(self.task_squared_norm)

    def summary(self) -> dict[str, float]:
        """
        The step's figures, ready to be logged: `throttle_rate` (share of groups in conflict), `energy_shed` (over all
        groups together), `cosine` and `alpha` (means over groups), and the norms `vlm_grad_norm` (before) and
        `vlm_grad_norm_projected` (after projection). With a transport penalty, `penalty` (scaled) with its
        `penalty_mean_term` and `penalty_std_term`; with a replayed batch, its `replay_loss`.
        """
        if not self.groups:
            return {}
        total = self.task_squared_norm.sum()
        if self.update_squared_norm is None:
            removed = (self.energy_shed * self.task_squared_norm).sum()
        else:
            removed = total - self.update_squared_norm.sum()
        figures = {
            "throttle_rate": (self.dot < 0).to(total).mean(),
            "energy_shed": torch.where(total == 0, 0.0, removed / torch.where(total == 0, 1.0, total)),
            "cosine": self.cosine.mean(),
            "alpha": self.alpha.mean(),
            "vlm_grad_norm": total.sqrt(),
            "vlm_grad_norm_projected": (total - removed).clamp(min=0).sqrt(),
        }
        if self.mean_term.numel():
            figures["penalty_mean_term"] = self.penalty_scale * self.mean_term.sum()
            figures["penalty_std_term"] = self.penalty_scale * self.std_term.sum()
            figures["penalty"] = figures["penalty_mean_term"] + figures["penalty_std_term"]
        if self.replay_loss is not None:
            figures["replay_loss"] = torch.as_tensor(self.replay_loss).to(total)
        # One transfer from the device for all of them.
        return dict(zip(figures, torch.stack(list(figures.values())).tolist(), strict=True))

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
