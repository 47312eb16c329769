"""
The dual backward: task gradient and reference direction in one `loss.backward()`.

Inside the context of a [`GradientShield`] the model's forward pass is unchanged, bit for bit, unless `reference_share`
splits its batches, which changes rounding. Hooks note each decoder layer's output and read from the autograd graph
which nodes and parameters belong to the layer. When the backward pass of the task loss is about to enter a layer, the
layer's share of the reference direction is computed first:

- `"streaming"`: the reference cotangent that came down from the layer above, plus this layer's own closed-form penalty
  gradient, goes through this layer's part of the graph only. Then autograd continues with the task cotangent through
  the same part, the layer's parameters are projected, and both graph and reference are dropped. Where a layer's
  branches meet in between, on the residual stream, the two take turns there already, so that activations are freed
  early. One layer's reference gradients exist at a time, except with `granularity="global"`, whose one projection at
  the end needs all. Under gradient checkpointing one recomputation serves both products.
- `"two_pass"`: the readable reference. The whole penalty is differentiated by autograd, before the task gradient
  enters the uppermost layer; all reference gradients exist at once.

Task gradients always travel through autograd's own graph, so none can be lost, by whatever way they leave a layer
(keys and values that an action expert reads, for instance).

Where several processes train one model, each on its share of a batch, the layers' statistics are brought together when
the backward pass comes to the layers, and both gradients of a layer while it goes through the layer below, in place of
DistributedDataParallel's own reduction: N processes with batch b do what one does with batch N·b.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from hf_aegis.anchors import find_decoder_layers
from hf_aegis.anchors.collection import without_cache
from hf_aegis.anchors.fingerprint import decoder_config
from hf_aegis.functional.bures import DEFAULT_EPS
from hf_aegis.gradients.combiners import Combiner, OneSidedGramSchmidt
from hf_aegis.gradients.data_parallel import (
    PROJECTION_SCOPES,
    MomentsExchange,
    ProjectionScope,
    find_process_group,
    inside_ddp,
    refuse_ddp_reduction,
    total_over_processes,
    without_ddp_reduction,
)
from hf_aegis.gradients.diagnostics import ProjectionReport
from hf_aegis.gradients.forward_pass import ForwardPass
from hf_aegis.gradients.graph import LostGradientError
from hf_aegis.gradients.groups import ParameterGroups
from hf_aegis.gradients.kept_references import KeptReferences
from hf_aegis.gradients.layer_entry import Phase
from hf_aegis.gradients.pass_recorder import PassRecorder
from hf_aegis.gradients.projector import GradientProjector, Granularity, check_options, refuse_sparse
from hf_aegis.gradients.recompute import SharedRecompute, refuse_reentrant
from hf_aegis.gradients.reduction import GradientAverage, PairedReduction
from hf_aegis.gradients.reference import ReferencePenalty, TransportPenalty
from hf_aegis.gradients.reference_backward import (
    DUAL_BACKWARDS,
    DualBackward,
    differentiate_penalties,
    stream_reference,
)
from hf_aegis.gradients.row_split import RowSplit
from hf_aegis.gradients.token_mask import TokenMask


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from hf_aegis.anchors import ActivationAnchor


class GradientShield:
    """
    A context in which every backward pass through a model's decoder layers is projected (arXiv 2604.16067, §3.3).

    ```python
    shield = GradientShield(model, anchor)
    with shield:
        loss = model(**batch).loss
        loss.backward()
    optimizer.step()
    print(shield.report.summary())
    ```

    Each backward pass is projected on its own and then accumulated, so with gradient accumulation the projection acts
    per micro-batch. Forward passes without gradients are ignored. A forward pass and its backward pass belong into the
    same `with` block; one block per optimiser step is what keeps least in memory.

    Args:
        model (`torch.nn.Module`):
            Any Hugging Face model with a stack of decoder layers, possibly wrapped by PEFT.
        anchor ([`ActivationAnchor`]):
            Statistics of the pre-trained model's layers. It says which kind of tokens count, too.
        dual_backward (`"streaming"` or `"two_pass"`, *optional*, defaults to `"streaming"`):
            How the reference direction is computed; the results agree to rounding.
        granularity (`"layer"`, `"global"` or `"tensor"`, *optional*, defaults to `"layer"`):
            What is projected as one vector. `"global"` keeps all reference gradients to the end of the backward pass.
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
            Remove the gradients of groups whose task gradient is not finite, so that no NaN reaches a parameter; all
            parameters that are not projected count as one group. Choose `False` where something else watches over
            whole steps, such as [`AEGISTrainer`] or a `GradScaler`, which has to see them.
        projection_scope (`"global"` or `"rank"`, *optional*, defaults to `"global"`):
            Where several processes share a batch: `"global"` projects the gradient of the whole batch against the
            penalty of its statistics, so that the number of processes makes no difference. It sends twice as much as
            plain data parallelism does, with every micro-batch. `"rank"` lets each process project its own gradient
            against the penalty of its own tokens, and takes the mean of what comes out: what is sent is what plain
            data parallelism sends, but the mean of projected gradients may work against the reference direction of
            the whole batch, and each process reports its own figures.
        reference_interval (`int`, *optional*, defaults to 1):
            Computes the reference direction in every so many-th backward pass, and projects off the same one in those
            between, which then cost little more than without a shield. An approximation: the direction is that of
            another batch and of earlier weights. One set of reference gradients is kept between backward passes.
        reference_share (`float`, *optional*, defaults to 1.0):
            Computes the reference direction from this share of each batch, its first rows, rounded up. An
            approximation: statistics and penalty are those of fewer tokens. Layers then run on the two parts of a
            batch one after the other, which must not make a difference to them; with several processes, each takes
            the share from its own rows. Only with `"streaming"`.
        process_group (`torch.distributed.ProcessGroup`, *optional*):
            The processes that share the batch; by default that of a `DistributedDataParallel`, else all processes, if
            torch.distributed was initialised. All must enter the block, and run forward and backward passes, alike.

    Attributes:
        report ([`ProjectionReport`], *optional*): What the last backward pass did.
        observer (`Callable[[str, Tensor, Tensor], None]`, *optional*):
            Called for each parameter with both, before it is projected: with its layer-wise group, this backward
            pass's task gradient, and the reference direction. `None` by default. They are not copies: they must be
            neither changed nor kept.
        metric (`Callable[[str], Tensor | None]`, *optional*):
            Weights of a parameter's elements, by its name, in inner products and norms, those of the report included;
            see [`AdamMetric`]. `None` by default: all count alike.
        combiner ([`Combiner`]): Gives α.
        on_reference (`Callable[[str, str, Tensor], None]`, *optional*):
            Called for each parameter that has a task gradient with the name of what is projected as one vector with
            it, its own, and this backward pass's reference direction, which may be kept. `None` by default.
        model (`torch.nn.Module`):
            What is projected, without a `DistributedDataParallel` around it; parameters have their names in it.
        wrapper (`torch.nn.Module`):
            What forward passes go through: to be set if the model was wrapped by `DistributedDataParallel` after the
            shield was made.

    Raises:
        ValueError: If an option is unknown, the layers are not found, or the anchor has another shape.

    Inside the context:

        ValueError: If the `attention_mask` is not `(batch, tokens)`, or the layers compute in float16.
        LayerLeakError: If the layers are not a chain of hidden outputs, as the dual backward needs it.
        LostGradientError: On leaving, if losses were differentiated but none of their gradients came to the layers.
        RuntimeError: If a backward pass goes through layers that ran in another block, or through the same ones
            again; if `DistributedDataParallel` would reduce gradients besides, or processes do not work alike.
    """

    def __init__(
        self,
        model: nn.Module,
        anchor: "ActivationAnchor",
        *,
        dual_backward: DualBackward = "streaming",
        granularity: Granularity = "layer",
        penalty_scale: float = 1.0,
        projection_eps: float = 1e-12,
        restoring: float = 0.0,
        variance_eps: float = DEFAULT_EPS,
        layers: str | nn.ModuleList | None = None,
        drop_non_finite: bool = True,
        projection_scope: ProjectionScope = "global",
        reference_interval: int = 1,
        reference_share: float = 1.0,
        process_group: "ProcessGroup | None" = None,
    ) -> None:
        if dual_backward not in DUAL_BACKWARDS:
            raise ValueError(f"dual_backward must be one of {DUAL_BACKWARDS}, found {dual_backward!r}")
        check_options(granularity, penalty_scale)
        if projection_scope not in PROJECTION_SCOPES:
            raise ValueError(f"projection_scope must be one of {PROJECTION_SCOPES}, found {projection_scope!r}")
        self._kept = KeptReferences(reference_interval)
        self._split = RowSplit(reference_share)
        if reference_share != 1 and dual_backward != "streaming":
            raise ValueError(f'reference_share={reference_share} needs dual_backward="streaming"')
        self.wrapper = model
        self.model = model = inside_ddp(model)
        self.layers = find_decoder_layers(model, layers)
        if len(set(self.layers)) != len(self.layers):
            raise ValueError("a decoder layer is in the list more than once, so that it has no single anchor")
        anchor.check_compatible(model, check="shape", layers=layers)
        self.dual_backward = dual_backward
        self.granularity: Granularity = granularity
        self.penalty_scale = penalty_scale
        self.drop_non_finite = drop_non_finite
        self.projection_scope: ProjectionScope = projection_scope
        self.process_group = process_group
        self.report: ProjectionReport | None = None
        self.observer: Callable[[str, Tensor, Tensor], None] | None = None
        self.metric: Callable[[str], Tensor | None] | None = None
        self.on_reference: Callable[[str, str, Tensor], None] | None = None
        self._penalty: ReferencePenalty = TransportPenalty(anchor, penalty_scale, variance_eps)
        self.combiner: Combiner = OneSidedGramSchmidt(projection_eps, restoring)
        self._groups: ParameterGroups | None = None
        self._groups_key: tuple[int, ...] = ()
        self._projector: GradientProjector | None = None
        self._processes: ProcessGroup | None = None
        self._exchange: MomentsExchange | None = None
        self._reduction: PairedReduction | None = None
        self._average: GradientAverage | None = None
        self._averages = False
        self._refreshes = True
        self._block = contextlib.ExitStack()
        token_mask = TokenMask(model, anchor.fingerprint.tokens)
        self._recorder = PassRecorder(self.layers, token_mask, dual_backward == "streaming", self._split)
        self._backward_passes = 0
        self._entered_passes = 0
        self._handles: list[RemovableHandle] = []
        self._phase = phase = Phase()
        # Graphs own what this closes over, and must not own the shield.
        self._recompute = SharedRecompute(keep=lambda: phase.is_reference)
        self._active = False

    def __enter__(self) -> Self:
        if self._active:
            raise RuntimeError("this GradientShield is already active; it does not nest")
        groups = self._current_groups()
        self._active = True
        self.report = None
        self._backward_passes = self._entered_passes = 0
        try:
            self._attach(groups)
        except BaseException:
            self._release()
            raise
        return self

    def _attach(self, groups: ParameterGroups) -> None:
        self._processes = find_process_group(self.wrapper, self.process_group)
        wanted = self._block.enter_context(without_ddp_reduction(self.wrapper))
        self._averages = self._processes is not None and self.projection_scope == "rank" and wanted
        if self._processes is not None and self.projection_scope == "global":
            if self._exchange is None or self._exchange.process_group is not self._processes:
                self._exchange = MomentsExchange(self._processes)
        else:
            self._exchange = None
        self._handles.extend(self._recorder.follow(self, groups, self._before_forward))
        if self._split.share != 1:
            # Keys and values of a part of the batch's rows fit into no cache.
            self._block.enter_context(without_cache(decoder_config(self.model, self.layers)))
        self._split.take_over(self.layers)
        for index, layer in enumerate(self.layers):
            if getattr(layer, "gradient_checkpointing", False):
                self._take_over_checkpointing(index, layer)
        for name, parameter in groups.parameters.items():
            self._handles.append(parameter.register_hook(partial(self._on_gradient, name)))
            self._handles.append(parameter.register_post_accumulate_grad_hook(partial(self._on_accumulated, name)))

    def __exit__(self, exception_type: type[BaseException] | None, *exception: object) -> None:
        unreached = (
            self._backward_passes > 0 and self._entered_passes == 0 and any(p.layers for p in self._recorder.passes)
        )
        self._release()
        if unreached and exception_type is None:
            raise LostGradientError(
                "losses were differentiated, but the task's gradient reached no decoder layer that ran: nothing was "
                "projected, and the loss does not train the layers. (Under gradient checkpointing transformers' "
                "layers do not write the cache through which π0's action expert reads their keys and values.)"
            )

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._recompute.give_back()
        self._split.give_back()
        self._abandon()
        self._block.close()
        self._handles.clear()
        self._recorder.clear()
        self._active = False

    def _abandon(self) -> None:
        """Lets go of a backward pass that did not come to its end."""
        if self._projector is not None:
            self._kept.clear()
        if self._reduction is not None:
            self._reduction.abandon()
        self._projector = self._reduction = self._average = None

    def _before_forward(self) -> None:
        refuse_ddp_reduction()
        if self._projector is not None:
            # An earlier backward pass raised before its end, and the caller went on.
            self._abandon()
            self._recorder.forget([forward for forward in self._recorder.passes if forward.entered])

    # -- backward -----------------------------------------------------------------------------------------------------

    def enter_layer(self, forward: ForwardPass, index: int, number: int) -> None:
        """Runs before the task's backward pass first touches a node of product `number` of a layer."""
        if self._projector is None:
            self._begin_backward()
        assert self._projector is not None
        if not forward.entered:
            self._find_penalties(forward)
        if not self._refreshes:
            forward.skip()
            return
        self._phase.is_reference = True
        try:
            if self.dual_backward == "two_pass":
                differentiate_penalties(forward, self._penalty, self._projector.add_reference)
            else:
                stream_reference(forward, index, number, self._projector.add_reference)
        finally:
            self._phase.is_reference = False

    def _begin_backward(self) -> None:
        assert self._groups is not None
        self.report = None
        self._backward_passes += 1
        self._refreshes = self._kept.begin()
        self._average = (
            GradientAverage(self._processes, self._groups.names)
            if self._averages and self._processes is not None
            else None
        )
        self._projector = projector = GradientProjector(
            self._groups.group_of,
            self.granularity,
            self.combiner,
            self.metric,
            self._kept.keeping(self.on_reference),
            None if self._average is None else self._average.add,
        )
        for name, reference in self._kept.references.items():
            projector.add_reference(name, reference)
        if self._exchange is not None:
            self._reduction = PairedReduction(
                self._exchange.process_group,
                self._groups.group_of,
                # What is kept was brought together already.
                projector.take_reference if self._refreshes else _no_reference,
                projector.add_reference,
                self._take_gradient,
            )
        for forward in self._recorder.passes:
            for record in forward.layers.values():
                projector.expect(record.parameters)
                if self._reduction is not None:
                    self._reduction.expect(record.parameters)
        # Autograd runs it when this backward pass has delivered its last gradient.
        torch.autograd.Variable._execution_engine.queue_callback(self._finish_backward)

    @torch.no_grad()
    def _find_penalties(self, forward: ForwardPass) -> None:
        records = forward.layers
        moments = {index: record.moments for index, record in records.items()}
        if self._exchange is not None:
            assert self._reduction is not None
            reached = [name for record in records.values() for name in record.parameters]
            shared = self._exchange(list(moments.values()), [*self._reduction.send_loose(), *reached])
            moments = dict(zip(records, shared.total, strict=True))
            for record, others in zip(records.values(), shared.others, strict=True):
                record.others = others
        for index, record in records.items():
            record.penalty = self._penalty.of(index, moments[index], record.mask)

    def _on_gradient(self, name: str, gradient: Tensor) -> None:
        if self._phase.is_reference:
            return
        if self._projector is None:
            # A part above the layers (an output head, an action expert) comes first and knows no reference.
            self._begin_backward()
        if self._reduction is None:
            self._note_gradient(name, gradient)
        else:
            assert self._groups is not None
            refuse_sparse(name, gradient)
            self._reduction.set_aside(name, self._groups.parameters[name])

    def _on_accumulated(self, name: str, parameter: Parameter) -> None:
        if self._reduction is None:
            self._note_accumulated(name, parameter)
        else:
            self._reduction.arrived(name, parameter)

    def _take_gradient(self, name: str, parameter: Parameter, gradient: Tensor, before: Tensor | None) -> None:
        """Does what the hooks do where one process is alone, with a gradient of all processes."""
        self._note_gradient(name, gradient)
        parameter.grad = gradient if before is None else before.add_(gradient)
        self._note_accumulated(name, parameter)

    def _note_gradient(self, name: str, gradient: Tensor) -> None:
        assert self._projector is not None and self._groups is not None
        if self._groups.is_protected(name):
            self._projector.on_gradient(name, gradient)
            if self.observer is not None and (reference := self._projector.reference(name)) is not None:
                self.observer(self._groups.group_of(name), gradient.detach(), reference.detach())
        elif self.drop_non_finite:
            self._projector.watch(name, gradient)

    def _note_accumulated(self, name: str, parameter: Parameter) -> None:
        assert self._projector is not None and self._groups is not None
        if self._groups.is_protected(name):
            self._projector.on_accumulated(name, parameter)
        else:
            if self.drop_non_finite:
                self._projector.on_watched_accumulated(name, parameter)
            if self._average is not None:
                self._average.add([parameter])

    def _finish_backward(self) -> None:
        projector = self._projector
        if projector is None:
            return
        if self._reduction is not None:
            self._reduction.finish()
        groups, scalars = projector.finish()
        if self._average is not None:
            assert self._groups is not None
            # What only earlier micro-batches had a gradient for, too.
            self._average.add(self._groups.parameters.values())
            self._average.finish()
        self._projector = self._reduction = self._average = None
        entered = [forward for forward in self._recorder.passes if forward.entered]
        self._entered_passes += len(entered)
        penalties = [r.penalty for forward in entered for r in forward.layers.values() if r.penalty is not None]
        self._recorder.forget(entered)
        reference = scalars[:, 2]
        if self._refreshes and self._kept.references and not bool(torch.isfinite(reference).all()):
            self._kept.clear()
        self.report = ProjectionReport.of(groups, scalars, penalties, self.penalty_scale)
        if self.drop_non_finite:
            own = self._processes if self.projection_scope == "rank" else None
            self.report.dropped = projector.drop_non_finite(partial(total_over_processes, process_group=own))

    # -- set-up -------------------------------------------------------------------------------------------------------

    def _current_groups(self) -> ParameterGroups:
        key = tuple(id(p) for p in self.model.parameters() if p.requires_grad)
        if self._groups is None or key != self._groups_key:
            self._check_devices()
            self._groups = ParameterGroups(self.model, self.layers)
            self._kept.clear()
            self._groups_key = key
        return self._groups

    def _check_devices(self) -> None:
        if any(isinstance(parameter, DTensor) for parameter in self.model.parameters()):
            raise ValueError(
                "the model's parameters are sharded over processes: use ShardedGradientShield, which is for FSDP2"
            )
        devices = sorted({str(p.device) for layer in self.layers for p in layer.parameters()})
        if len(devices) > 1:
            raise ValueError(
                f"the decoder layers are spread over {devices}; projecting a model that is split over several devices "
                "is not supported"
            )

    def _take_over_checkpointing(self, index: int, layer: nn.Module) -> None:
        if self.dual_backward == "streaming":
            self._recompute.take_over(layer)
        else:
            refuse_reentrant(index, layer)


def _no_reference(name: str) -> None:
    return None
