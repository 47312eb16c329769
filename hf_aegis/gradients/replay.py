"""A replayed batch's gradient as the reference: A-GEM, PCGrad, GradDrop (arXiv 1812.00420, 2001.06782, 2010.06808)."""

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from hf_aegis.anchors import find_decoder_layers
from hf_aegis.functional.inner_product import inner_product
from hf_aegis.gradients.combiners import GroupScalars, group_scalars, make_combiner
from hf_aegis.gradients.data_parallel import (
    PROJECTION_SCOPES,
    ProjectionScope,
    find_process_group,
    inside_ddp,
    total_over_processes,
    without_ddp_reduction,
)
from hf_aegis.gradients.diagnostics import ProjectionReport
from hf_aegis.gradients.groups import ParameterGroups
from hf_aegis.gradients.projector import (
    UNPROTECTED,
    Granularity,
    check_options,
    drop_where_not_finite,
    natural_order,
    refuse_sparse,
    unit_of,
)
from hf_aegis.gradients.recompute import refuse_reentrant
from hf_aegis.gradients.reduction import GradientAverage, TensorAverage


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ReplayShield:
    r"""
    A context in which the task's gradients are combined with those of a loss on the pre-training task's own data.

    ```python
    shield = ReplayShield(model, lambda: model(**next(replay_batches)).loss, combiner="pcgrad")
    with shield:
        loss = model(**batch).loss
        loss.backward()
    optimizer.step()
    print(shield.report.summary())
    ```

    On entering, the replay loss is computed and differentiated; its gradients are the reference. On leaving, the
    gradients that the block left in `.grad` are combined with them, group by group, and added to those that were there
    before, so that with gradient accumulation every micro-batch is combined on its own. What the replay loss does not
    reach, such as an action expert, keeps its task gradient. A block that differentiates nothing changes nothing, and
    one that raises leaves the gradients as they were before it.

    Where a group's replay gradient is not finite, its task gradient stays as it is. Costs a forward and a backward
    pass of the replay batch, and memory for a second set of gradients (a third one while they are combined, but one
    group's only unless `granularity="global"`).

    Args:
        model (`torch.nn.Module`):
            Any Hugging Face model with a stack of decoder layers, possibly wrapped by PEFT.
        replay_loss (`Callable[[], Tensor]`):
            Draws a replay batch and returns its loss, a scalar. It is called once per block, with gradients on, and
            brings its own autocast where one is needed.
        combiner (`str`, *optional*, defaults to `"one_sided"`):
            `"one_sided"` (A-GEM), `"pcgrad"` or `"graddrop"`.
        granularity (`"layer"`, `"global"` or `"tensor"`, *optional*, defaults to `"layer"`):
            What is combined as one vector. A-GEM and PCGrad as published are `"global"`. GradDrop combines each
            element by itself: there it says only in which order the numbers are drawn, for which groups figures are
            reported, and how far a replay gradient that is not finite turns it off.
        projection_eps (`float`, *optional*, defaults to `1e-12`):
            Damping of the projections' denominators; GradDrop has none.
        layers (`str` or `torch.nn.ModuleList`, *optional*):
            Where the decoder layers are, if they cannot be found.
        seed (`int`, *optional*, defaults to 0):
            GradDrop draws from `seed` and `step` only.
        drop_non_finite (`bool`, *optional*, defaults to `True`):
            Remove the gradients of groups whose task gradient is not finite; all that the replay loss does not reach
            counts as one group. What was accumulated before stays.
        projection_scope (`"global"` or `"rank"`, *optional*, defaults to `"global"`):
            Where several processes share a batch, each with a replay batch of its own: whether the means of their two
            gradients are combined, or each process combines its own and the mean of what comes out is taken.
        process_group (`torch.distributed.ProcessGroup`, *optional*):
            The processes; by default that of a `DistributedDataParallel`, else all processes, if torch.distributed
            was initialised. All must enter and leave the block alike.

    Attributes:
        report ([`ProjectionReport`], *optional*):
            What the last block did, with its `replay_loss`. `None` if it differentiated nothing.
        replay_scale (`float`):
            Factor on the replay gradient, 1 by default. Where the task's loss is divided by the number of accumulated
            micro-batches, set it to one over that number. A one-sided projection does not depend on it.
        step (`int`):
            Number of blocks so far; set it when training is resumed, so that GradDrop draws what it would have drawn.
        wrapper (`torch.nn.Module`):
            What forward passes go through: to be set if the model was wrapped by `DistributedDataParallel` after the
            shield was made.

    Raises:
        ValueError: If an option is unknown or the layers are not found.

    Inside the context:

        ValueError: If the replay loss is no differentiable scalar or reaches no trainable parameter, or the layers are
            checkpointed with `use_reentrant=True`.
        NotImplementedError: If a gradient is sparse.
    """

    def __init__(
        self,
        model: nn.Module,
        replay_loss: Callable[[], Tensor],
        *,
        combiner: str = "one_sided",
        granularity: Granularity = "layer",
        projection_eps: float = 1e-12,
        layers: str | nn.ModuleList | None = None,
        seed: int = 0,
        drop_non_finite: bool = True,
        projection_scope: ProjectionScope = "global",
        process_group: "ProcessGroup | None" = None,
    ) -> None:
        if projection_scope not in PROJECTION_SCOPES:
            raise ValueError(f"projection_scope must be one of {PROJECTION_SCOPES}, found {projection_scope!r}")
        check_options(granularity)
        if seed < 0:
            raise ValueError(f"seed must not be negative, found {seed}")
        self.wrapper = model
        self.model = model = inside_ddp(model)
        self.replay_loss = replay_loss
        self.projection_scope: ProjectionScope = projection_scope
        self.process_group = process_group
        self.layers = find_decoder_layers(model, layers)
        self.granularity: Granularity = granularity
        self.seed = seed
        self.drop_non_finite = drop_non_finite
        self.replay_scale = 1.0
        self.step = 0
        self.report: ProjectionReport | None = None
        self._combiner = make_combiner(combiner, projection_eps)
        self._groups: ParameterGroups | None = None
        self._references: dict[str, Tensor] = {}
        self._before: dict[str, Tensor | None] = {}
        self._replay_loss: Tensor | None = None
        self._processes: ProcessGroup | None = None
        self._averages = False
        self._reference_means: TensorAverage | None = None
        self._block = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if self._groups is not None:
            raise RuntimeError("this ReplayShield is already active; it does not nest")
        for index, layer in enumerate(self.layers):
            refuse_reentrant(index, layer)
        self.report = None
        # Anew each time: what trains may have changed since.
        self._groups = ParameterGroups(self.model, self.layers)
        self._before = {name: parameter.grad for name, parameter in self._groups.parameters.items()}
        self._processes = find_process_group(self.wrapper, self.process_group)
        self._averages = self._block.enter_context(without_ddp_reduction(self.wrapper))
        for parameter in self._groups.parameters.values():
            parameter.grad = None
        try:
            self._differentiate_replay(self._groups)
        except BaseException:
            self._release(restore=True)
            raise
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *exception: object) -> None:
        combined = False
        try:
            if exception_type is None:
                assert self._groups is not None
                combined = self._combine(self._groups)
        finally:
            self._release(restore=not combined)

    def _release(self, restore: bool) -> None:
        assert self._groups is not None
        if restore:
            for name, parameter in self._groups.parameters.items():
                parameter.grad = self._before[name]
        self._groups = self._replay_loss = self._reference_means = None
        self._block.close()
        self._before.clear()
        self._references.clear()

    def _differentiate_replay(self, groups: ParameterGroups) -> None:
        with torch.enable_grad():
            loss = self.replay_loss()
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"the replay loss must be a differentiable scalar tensor, found {found}")
        gradients = torch.autograd.grad(
            loss,
            list(groups.parameters.values()),
            grad_outputs=torch.full_like(loss, self.replay_scale),
            allow_unused=True,
        )
        self._references = {
            name: gradient for name, gradient in zip(groups.parameters, gradients, strict=True) if gradient is not None
        }
        if not self._references:
            raise ValueError(f"the replay loss reaches no trainable parameter of the {type(self.model).__name__}")
        for name, gradient in self._references.items():
            refuse_sparse(name, gradient)
        # Nothing of the replay's forward pass may have been accumulated, even if the loss itself ran a backward pass.
        for parameter in groups.parameters.values():
            parameter.grad = None
        self._replay_loss = loss.detach()
        if self._processes is not None and self.projection_scope == "global":
            self._replay_loss = total_over_processes(self._replay_loss, self._processes) / self._processes.size()
            # Waited for when the task's gradients are there.
            self._reference_means = TensorAverage(self._references, self._processes)

    def _combine(self, groups: ParameterGroups) -> bool:
        """Combines what the block left in `.grad`; returns whether there was anything."""
        task = {name: p.grad for name, p in groups.parameters.items() if p.grad is not None}
        if not task:
            return False
        for name, gradient in task.items():
            refuse_sparse(name, gradient)
        if self._reference_means is not None:
            assert self._processes is not None
            self._references = self._reference_means.wait()
            average = GradientAverage(self._processes, groups.names)
            average.add(groups.parameters[name] for name in task)
            average.finish()
            task = {name: p.grad for name, p in groups.parameters.items() if p.grad is not None}
        groups.note_reached(self._references)
        units: dict[str, list[str]] = {}
        others = []
        for name in groups.parameters:
            if not groups.is_protected(name):
                others += [name] if name in task else []
            elif name in task or (self._combiner.symmetric and name in self._references):
                units.setdefault(unit_of(name, groups.group_of(name), self.granularity), []).append(name)
        names = sorted(units, key=natural_order)
        generator = self._generator(next(iter(task.values())).device)
        rows = [self._combine_unit([groups.parameters[n] for n in units[u]], units[u], generator) for u in names]
        self.report = self._make_report(names, rows)
        if self.drop_non_finite:
            self._drop_non_finite(units, others, groups.parameters)
        for name, parameter in groups.parameters.items():
            if (before := self._before[name]) is not None:
                parameter.grad = before if parameter.grad is None else before.add_(parameter.grad)
        if self._processes is not None and self.projection_scope == "rank" and self._averages:
            average = GradientAverage(self._processes, groups.names)
            average.add(groups.parameters.values())
            average.finish()
        self.step += 1
        return True

    def _combine_unit(
        self, parameters: Sequence[Parameter], names: Sequence[str], generator: torch.Generator
    ) -> tuple[Tensor, ...]:
        task = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        reference = [
            torch.zeros_like(p) if (gradient := self._references.pop(name, None)) is None else gradient
            for name, p in zip(names, parameters, strict=True)
        ]
        scalars = group_scalars(task, reference)
        update = self._combiner.combine(task, reference, generator, scalars)
        for parameter, gradient in zip(parameters, update, strict=True):
            parameter.grad = gradient
        return (*scalars, self._combiner(*scalars), _squared_norm(update))

    def _make_report(self, names: list[str], rows: list[tuple[Tensor, ...]]) -> ProjectionReport:
        table = torch.stack([torch.stack(row) for row in rows]) if rows else torch.zeros(0, 5)
        dot, task, reference, alpha, update = table.unbind(dim=1)
        return ProjectionReport(
            groups=names,
            **GroupScalars(dot, task, reference)._asdict(),
            alpha=alpha,
            mean_term=table.new_zeros(0),
            std_term=table.new_zeros(0),
            penalty_scale=1.0,
            replay_loss=self._replay_loss,
            update_squared_norm=update if self._combiner.symmetric else None,
        )

    def _drop_non_finite(
        self, units: dict[str, list[str]], others: list[str], parameters: dict[str, Parameter]
    ) -> None:
        assert self.report is not None
        groups = {unit: [parameters[name] for name in units[unit]] for unit in self.report.groups}
        squares = [*self.report.task_squared_norm.unbind()]
        if gradients := [g for name in others if (g := parameters[name].grad) is not None]:
            groups[UNPROTECTED] = [parameters[name] for name in others]
            squares.append(_squared_norm(gradients))
        if not squares:
            return
        # With a scope of single processes, what one of them drops the others drop.
        own = self._processes if self.projection_scope == "rank" else None
        self.report.dropped = drop_where_not_finite(groups, total_over_processes(torch.stack(squares), own))

    def _generator(self, device: torch.device) -> torch.Generator:
        seed = int(np.random.SeedSequence([self.seed, self.step]).generate_state(1, np.uint64)[0])
        return torch.Generator(device).manual_seed(seed)


def _squared_norm(gradients: Sequence[Tensor]) -> Tensor:
    return torch.stack([inner_product(gradient, gradient) for gradient in gradients]).sum()
