"""Projects what an optimiser does to the weights, in place of the gradient that it is given."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from hf_aegis.gradients.combiners import group_scalars
from hf_aegis.gradients.shield import GradientShield


class UpdateProjection:
    """
    Takes the projection over from a [`GradientShield`]: gradients stay as they are, and after each optimiser step what
    it took from each group's weights is projected off the group's reference direction, as the gradient would have
    been. Whatever the optimiser does (momentum, rescaling, weight decay), the step that is taken does not work against
    the direction.

    ```python
    shield = GradientShield(model, anchor)
    UpdateProjection(shield, optimizer)
    ```

    Reference directions of the backward passes between two steps are summed. They and the weights before the step are
    kept until it: memory for two more sets of what trains. What is not projected with the shield, such as an action
    expert, is left alone. The shield's report goes on describing gradients, with an α of zero.

    Args:
        shield ([`GradientShield`]): Gives reference directions, granularity and combiner.
        optimizer (`torch.optim.Optimizer`): Takes the steps.

    Raises:
        ValueError: If each of several processes would project its weights against a direction of its own.
    """

    def __init__(self, shield: GradientShield, optimizer: Optimizer) -> None:
        if shield.projection_scope == "rank":
            raise ValueError(
                'projection_scope="rank" would project the weights of each process against another direction, and '
                'they would part; use "global"'
            )
        self._combiner = shield.combiner
        self._parameters = dict(shield.model.named_parameters())
        self._references: dict[str, dict[str, Tensor]] = defaultdict(dict)
        self._before: dict[str, Tensor] = {}
        shield.combiner = _leave_alone
        shield.on_reference = self._add
        optimizer.register_step_pre_hook(self._note_weights)
        optimizer.register_step_post_hook(self._project)

    def _add(self, unit: str, name: str, reference: Tensor) -> None:
        known = self._references[unit].get(name)
        self._references[unit][name] = reference if known is None else known + reference

    def _note_weights(self, *_: Any) -> None:
        names = [name for references in self._references.values() for name in references]
        self._before = {name: self._parameters[name].detach().clone() for name in names}

    @torch.no_grad()
    def _project(self, *_: Any) -> None:
        for references in self._references.values():
            parameters = [self._parameters[name] for name in references]
            before = [self._before[name] for name in references]
            _project_change(parameters, before, list(references.values()), self._combiner)
        self._references.clear()
        self._before.clear()


def _project_change(parameters: list[Parameter], before: list[Tensor], reference: list[Tensor], combiner: Any) -> None:
    # Differences of half-precision weights are exact enough in float32 only.
    wide = [torch.promote_types(p.dtype, torch.float32) for p in parameters]
    descents = [old.to(t) - new.to(t) for old, new, t in zip(before, parameters, wide, strict=True)]
    alpha = combiner(*group_scalars(descents, reference))
    for new, old, descent, r in zip(parameters, before, descents, reference, strict=True):
        projected = (old.to(descent) - (descent - alpha.to(descent) * r.to(descent))).to(new.dtype)
        new.copy_(torch.where(alpha.to(new.device) != 0, projected, new))


def _leave_alone(dot: Tensor, task_squared_norm: Tensor, reference_squared_norm: Tensor) -> Tensor:
    return torch.zeros_like(dot)
