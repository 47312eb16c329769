"""The projection for models whose parameters FSDP2 has spread over processes."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from hf_aegis.anchors import find_decoder_layers
from hf_aegis.functional.bures import DEFAULT_EPS
from hf_aegis.gradients.combiners import Combiner, OneSidedGramSchmidt, group_scalars
from hf_aegis.gradients.data_parallel import LayerMoments, MomentsExchange, as_share, find_process_group
from hf_aegis.gradients.diagnostics import ProjectionReport
from hf_aegis.gradients.forward_pass import hidden_output
from hf_aegis.gradients.graph import LayerLeakError, LostGradientError
from hf_aegis.gradients.groups import ParameterGroups
from hf_aegis.gradients.layer_entry import in_backward
from hf_aegis.gradients.projector import (
    UNPROTECTED,
    Granularity,
    bend,
    check_options,
    drop_where_not_finite,
    natural_order,
    unit_of,
)
from hf_aegis.gradients.recompute import refuse_reentrant
from hf_aegis.gradients.reference import LayerPenalty, TransportPenalty, refuse_float16
from hf_aegis.gradients.shards import reshard
from hf_aegis.gradients.token_mask import TokenMask


if TYPE_CHECKING:
    from hf_aegis.anchors import ActivationAnchor


class ShardedGradientShield:
    """
    What [`GradientShield`] does, for a model that `torch.distributed.fsdp.fully_shard` has sharded over processes,
    each of which has its share of a batch: the same gradients as those of one process with the whole batch.

    ```python
    for layer in find_decoder_layers(model):
        fully_shard(layer)
    fully_shard(model)
    shield = ShardedGradientShield(model, anchor)
    with shield:
        loss = model(**batch).loss
        loss.backward()
    optimizer.step()
    ```

    It is the two-pass form. When the task's backward pass is about to enter the model, the penalty is differentiated
    first, through the same graph and FSDP's own hooks, which gather parameters and reduce gradients to shards; the
    task's backward pass follows. On leaving the block the shards are projected: inner products and norms of all groups
    are summed over the processes by one small all-reduce. It costs a second backward pass through the decoder, and
    until the block ends a second set of gradient *shards*.

    One forward pass with gradients, through the model itself, and one backward pass belong into each block; with
    gradient accumulation every micro-batch is projected by itself. A block that raises leaves the gradients as they
    were before it.

    Args:
        model (`torch.nn.Module`):
            Any Hugging Face model with a stack of decoder layers, itself given to `fully_shard`, over a mesh of one
            dimension. Gradient sync must be on (`set_requires_gradient_sync`), with FSDP's own divisor.
        anchor ([`ActivationAnchor`]):
            Statistics of the pre-trained model's layers. It says which kind of tokens count, too.
        granularity (`"layer"`, `"global"` or `"tensor"`, *optional*, defaults to `"layer"`):
            What is projected as one vector.
        penalty_scale (`float`, *optional*, defaults to `1.0`):
            Weight λ of the transport penalty.
        projection_eps (`float`, *optional*, defaults to `1e-12`):
            Damping of the projection's denominator.
        restoring (`float`, *optional*, defaults to `0.0`):
            Adds the reference direction at this share of the task gradient's length; see [`OneSidedGramSchmidt`].
        variance_eps (`float`, *optional*, defaults to `1e-6`):
            Added to variances under the square root.
        layers (`str` or `torch.nn.ModuleList`, *optional*):
            Where the decoder layers are, if they cannot be found.
        drop_non_finite (`bool`, *optional*, defaults to `True`):
            Remove the gradients of groups whose task gradient is not finite in any process; all parameters that are
            not projected count as one group.

    Attributes:
        report ([`ProjectionReport`], *optional*): What the last block did; the same in all processes.
        combiner ([`Combiner`]): Gives α.

    Raises:
        ValueError: If an option is unknown, the layers are not found, the anchor has another shape, or the model is
            not sharded as described.

    Inside the context:

        ValueError: If the `attention_mask` is not `(batch, tokens)`, or the layers compute in float16, or are
            checkpointed with `use_reentrant=True`.
        LayerLeakError: If a layer runs twice in a block.
        LostGradientError: On leaving, if none of the losses' gradients came to the model's outputs.
        RuntimeError: If gradients were not reduced.
    """

    def __init__(
        self,
        model: nn.Module,
        anchor: "ActivationAnchor",
        *,
        granularity: Granularity = "layer",
        penalty_scale: float = 1.0,
        projection_eps: float = 1e-12,
        restoring: float = 0.0,
        variance_eps: float = DEFAULT_EPS,
        layers: str | nn.ModuleList | None = None,
        drop_non_finite: bool = True,
    ) -> None:
        check_options(granularity, penalty_scale)
        self.model = model
        self.layers = find_decoder_layers(model, layers)
        anchor.check_compatible(model, check="shape", layers=layers)
        self.granularity: Granularity = granularity
        self.penalty_scale = penalty_scale
        self.drop_non_finite = drop_non_finite
        self.combiner: Combiner = OneSidedGramSchmidt(projection_eps, restoring)
        self.report: ProjectionReport | None = None
        self._process_group = _shard_group(model)
        self._penalty = TransportPenalty(anchor, penalty_scale, variance_eps)
        self._token_mask = TokenMask(model, anchor.fingerprint.tokens)
        self._exchange: MomentsExchange | None = None
        if (processes := find_process_group(model, self._process_group)) is not None:
            self._exchange = MomentsExchange(processes)
        self._groups: ParameterGroups | None = None
        self._before: dict[str, Tensor | None] = {}
        self._outputs: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._references: dict[str, Tensor] = {}
        self._penalties: list[LayerPenalty] = []
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        if self._groups is not None:
            raise RuntimeError("this ShardedGradientShield is already active; it does not nest")
        for index, layer in enumerate(self.layers):
            refuse_reentrant(index, layer)
        self.report = None
        reshard(self.model)  # an evaluation may have come before
        self._groups = groups = ParameterGroups(self.model, self.layers)
        self._before = {name: parameter.grad for name, parameter in groups.parameters.items()}
        _clear(groups)
        self._handles.extend(self._token_mask.follow())
        for index, layer in enumerate(self.layers):
            self._handles.append(layer.register_forward_hook(partial(self._on_layer_output, index)))
        self._handles.append(self.model.register_forward_hook(self._on_output))
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *exception: object) -> None:
        done = False
        try:
            if exception_type is None:
                done = self._combine()
        finally:
            self._release(restore=not done)

    def _release(self, restore: bool) -> None:
        assert self._groups is not None
        for handle in self._handles:
            handle.remove()
        if restore:
            for name, parameter in self._groups.parameters.items():
                parameter.grad = self._before[name]
        self._groups = None
        for held in (self._handles, self._before, self._outputs, self._references, self._penalties):
            held.clear()

    # -- forward ------------------------------------------------------------------------------------------------------

    def _on_layer_output(self, index: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Checkpointed layers run again in the backward pass.
        if not torch.is_grad_enabled() or in_backward():
            return
        hidden = hidden_output(output)
        if not hidden.requires_grad:
            return  # nothing below this output trains
        refuse_float16(index, hidden)
        if index in self._outputs or self._penalties:
            raise LayerLeakError(
                f"decoder layer {index} ran twice: one forward pass with gradients belongs into each block"
            )
        self._outputs[index] = (hidden, self._token_mask.current())

    def _on_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not torch.is_grad_enabled() or not self._outputs:
            return None
        # After FSDP's own hook, so that backward comes here before FSDP prepares for it.
        return tree_map_only(Tensor, lambda t: _Gate.apply(self, t) if t.requires_grad else t, output)

    # -- backward -----------------------------------------------------------------------------------------------------

    def differentiate_penalty(self) -> None:
        """Leaves the penalty's gradient with the shield; called when the task's gradient comes to the model."""
        if not self._outputs:
            return
        assert self._groups is not None
        outputs, self._outputs = self._outputs, {}
        with torch.no_grad():
            total = moments = [LayerMoments.of(hidden, mask) for hidden, mask in outputs.values()]
            others: list[LayerMoments | None] = [None] * len(moments)
            if self._exchange is not None:
                total, others[:] = self._exchange(moments, (str(index) for index in outputs))
            self._penalties = [
                self._penalty.of(index, merged, mask)
                for (index, (_, mask)), merged in zip(outputs.items(), total, strict=True)
            ]
        processes = None if self._exchange is None else self._exchange.process_group
        with torch.enable_grad():
            terms = [
                self._penalty.differentiable(index, hidden, mask, rest)
                for (index, (hidden, mask)), rest in zip(outputs.items(), others, strict=True)
            ]
            as_share(torch.stack(terms).sum(), processes).backward(retain_graph=True)
        self._references = {n: p.grad for n, p in self._groups.parameters.items() if p.grad is not None}
        if not self._references:
            raise RuntimeError(
                "the penalty's gradient came to no parameter: no decoder layer trains, or FSDP was told not to reduce "
                "gradients (`set_requires_gradient_sync(False)`), which would leave nothing to project"
            )
        _clear(self._groups)

    @torch.no_grad()
    def _combine(self) -> bool:
        """Projects what the block left in `.grad`; returns whether there was anything."""
        groups = self._groups
        assert groups is not None
        if not self._references:
            if any(p.grad is not None for p in groups.parameters.values()):
                raise LostGradientError(
                    "a loss was differentiated, but not by what the model returned in this block, so that nothing was "
                    "projected"
                )
            return False
        task = {name: _local(p.grad) for name, p in groups.parameters.items() if p.grad is not None}
        if not task:
            return False
        groups.note_reached(self._references)
        units: dict[str, list[str]] = {}
        for name in task:
            protected = groups.is_protected(name)
            unit = unit_of(name, groups.group_of(name), self.granularity) if protected else UNPROTECTED
            units.setdefault(unit, []).append(name)
        # Projected groups first, by number; what is not projected only has a norm.
        names = sorted(units.keys() - {UNPROTECTED}, key=natural_order)
        every = [*names, *(units.keys() & {UNPROTECTED})]
        references = {name: _local(reference) for name, reference in self._references.items()}
        table = torch.stack([self._scalars(units[unit], task, references) for unit in every])
        distributed.all_reduce(table, group=self._process_group)
        alphas = [self.combiner(*row) for row in table[: len(names)]]
        for unit, alpha in zip(names, alphas, strict=True):
            for name in units[unit]:
                if name in references:
                    bend(task[name], references[name], alpha)
        coefficients = torch.stack(alphas) if alphas else table.new_zeros(0)
        scalars = torch.cat([table[: len(names)], coefficients[:, None]], dim=1)
        self.report = ProjectionReport.of(names, scalars, self._penalties, self.penalty_scale)
        if self.drop_non_finite:
            parameters = {unit: [groups.parameters[name] for name in units[unit]] for unit in every}
            self.report.dropped = drop_where_not_finite(parameters, table[:, 1])
        for name, parameter in groups.parameters.items():
            if (before := self._before[name]) is not None:
                parameter.grad = before if parameter.grad is None else before.add_(parameter.grad)
        return True

    @staticmethod
    def _scalars(names: list[str], task: Mapping[str, Tensor], references: Mapping[str, Tensor]) -> Tensor:
        zeros = [torch.zeros_like(task[name]) if name not in references else references[name] for name in names]
        return torch.stack(group_scalars([task[name] for name in names], zeros))


class _Gate(torch.autograd.Function):
    """The identity on what the model returns; backward, the first thing that the task's gradient passes through."""

    @staticmethod
    def forward(ctx: Any, shield: ShardedGradientShield, tensor: Tensor) -> Tensor:
        ctx.shield = shield
        # The Trainer scales a loss in place, which is not allowed on a view.
        return tensor.clone() if tensor.dim() == 0 else tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        ctx.shield.differentiate_penalty()
        return None, gradient


def _shard_group(model: nn.Module) -> "distributed.ProcessGroup":
    if not isinstance(model, FSDPModule):
        raise ValueError(
            f"the {type(model).__name__} itself has not been given to fully_shard; for models that are not sharded "
            "there is GradientShield"
        )
    meshes = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if not isinstance(parameter, DTensor) or parameter.device_mesh.ndim != 1:
            found = f"{parameter.device_mesh}" if isinstance(parameter, DTensor) else "not sharded"
            raise ValueError(f"{name} must be sharded over a mesh of one dimension to be projected, found {found}")
        meshes.append(parameter.device_mesh)
    if not meshes:
        raise ValueError(f"no parameter of the {type(model).__name__} trains")
    if any(mesh != meshes[0] for mesh in meshes):
        raise ValueError("the parameters are sharded over more than one mesh, whose shards have no common scalars")
    return meshes[0].get_group()


def _local(gradient: Any) -> Tensor:
    assert isinstance(gradient, DTensor)
    return gradient.to_local()


def _clear(groups: ParameterGroups) -> None:
    parameter: Parameter
    for parameter in groups.parameters.values():
        parameter.grad = None
