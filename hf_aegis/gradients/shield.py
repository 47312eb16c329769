"""
The dual backward: task gradient and reference direction in one `loss.backward()`.

Inside the context of a [`GradientShield`] the model's forward pass is unchanged, bit for bit. Hooks note each decoder
layer's output and read from the autograd graph which nodes and parameters belong to the layer. When the backward pass
of the task loss is about to enter a layer, the layer's share of the reference direction is computed first:

- `"streaming"`: the reference cotangent that came down from the layer above, plus this layer's own closed-form penalty
  gradient, goes through this layer's part of the graph only. Then autograd continues with the task cotangent through
  the same part, the layer's parameters are projected, and both graph and reference are dropped. One layer's
  reference gradients exist at a time; under gradient checkpointing one recomputation serves both products.
- `"two_pass"`: the readable reference. The whole penalty is differentiated by autograd, before the task gradient
  enters the uppermost layer; all reference gradients exist at once.

Task gradients always travel through autograd's own graph, so none can be lost, by whatever way they leave a layer
(keys and values that an action expert reads, for instance).
"""

import inspect
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from hf_aegis.anchors import find_decoder_layers
from hf_aegis.functional.bures import DEFAULT_EPS
from hf_aegis.gradients.diagnostics import ProjectionReport
from hf_aegis.gradients.graph import GraphSegment, LayerLeakError, walk_segment
from hf_aegis.gradients.groups import LAYER_PREFIX, ParameterGroups
from hf_aegis.gradients.projector import GRANULARITIES, GradientProjector, Granularity, OneSidedGramSchmidt
from hf_aegis.gradients.recompute import SharedRecompute
from hf_aegis.gradients.reference import LayerPenalty, TransportPenalty


if TYPE_CHECKING:
    from hf_aegis.anchors import ActivationAnchor


DualBackward = Literal["streaming", "two_pass"]
DUAL_BACKWARDS: tuple[DualBackward, ...] = ("streaming", "two_pass")


@dataclass(eq=False)
class _LayerRecord:
    """One layer's output in one forward pass."""

    output: GradientEdge
    segment: GraphSegment
    hidden: Tensor
    version: int
    penalty: LayerPenalty
    differentiable_penalty: Tensor | None
    done: bool = False


@dataclass(eq=False)
class _ForwardPass:
    """The layer outputs of one forward pass, and the reference cotangents on their way down."""

    layers: dict[int, _LayerRecord] = field(default_factory=dict)
    boundaries: dict[Node, int] = field(default_factory=dict)
    cotangents: dict[int, Tensor] = field(default_factory=dict)


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
    same `with` block.

    Args:
        model (`torch.nn.Module`):
            Any Hugging Face model with a stack of decoder layers, possibly wrapped by PEFT.
        anchor ([`ActivationAnchor`]):
            Statistics of the pre-trained model's layers.
        dual_backward (`"streaming"` or `"two_pass"`, *optional*, defaults to `"streaming"`):
            How the reference direction is computed; the results agree to rounding.
        granularity (`"layer"`, `"global"` or `"tensor"`, *optional*, defaults to `"layer"`):
            What is projected as one vector.
        penalty_scale (`float`, *optional*, defaults to `1.0`):
            Weight λ of the transport penalty.
        projection_eps (`float`, *optional*, defaults to `1e-12`):
            Damping of the projection's denominator.
        variance_eps (`float`, *optional*, defaults to `1e-6`):
            Added to variances under the square root.
        layers (`str` or `torch.nn.ModuleList`, *optional*):
            Where the decoder layers are, if they cannot be found.
        drop_non_finite (`bool`, *optional*, defaults to `True`):
            Remove the gradients of groups whose task gradient is not finite, so that no NaN reaches a parameter. With
            a `GradScaler` choose `False`: it has to see them.

    Attributes:
        report ([`ProjectionReport`], *optional*): What the last backward pass did.

    Raises:
        ValueError: If an option is unknown, the layers are not found, or the anchor has another shape.
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
        variance_eps: float = DEFAULT_EPS,
        layers: str | nn.ModuleList | None = None,
        drop_non_finite: bool = True,
    ) -> None:
        if dual_backward not in DUAL_BACKWARDS:
            raise ValueError(f"dual_backward must be one of {DUAL_BACKWARDS}, found {dual_backward!r}")
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity must be one of {GRANULARITIES}, found {granularity!r}")
        if not penalty_scale > 0:
            raise ValueError(f"penalty_scale must be positive, found {penalty_scale}")
        self.model = model
        self.layers = find_decoder_layers(model, layers)
        anchor.check_compatible(model, check="shape", layers=layers)
        self.dual_backward = dual_backward
        self.granularity: Granularity = granularity
        self.penalty_scale = penalty_scale
        self.drop_non_finite = drop_non_finite
        self.report: ProjectionReport | None = None
        self._penalty = TransportPenalty(anchor, penalty_scale, variance_eps)
        self._combiner = OneSidedGramSchmidt(projection_eps)
        self._groups: ParameterGroups | None = None
        self._groups_key: tuple[int, ...] = ()
        self._projector: GradientProjector | None = None
        self._passes: list[_ForwardPass] = []
        self._handles: list[RemovableHandle] = []
        self._checkpoint_functions: list[tuple[nn.Module, Callable[..., Any]]] = []
        self._mask: Tensor | None = None
        self._recompute = SharedRecompute(keep=lambda: self._in_reference_pass)
        self._in_reference_pass = False
        self._active = False

    def __enter__(self) -> Self:
        if self._active:
            raise RuntimeError("this GradientShield is already active; it does not nest")
        groups = self._current_groups()
        self._check_devices()
        self._active = True
        self.report = None
        self._handles.append(self.model.register_forward_pre_hook(self._on_model_input, with_kwargs=True))
        for index, layer in enumerate(self.layers):
            self._handles.append(layer.register_forward_hook(partial(self._on_layer_output, index)))
            if getattr(layer, "gradient_checkpointing", False):
                self._replace_checkpointing(index, layer)
        for name, parameter in groups.parameters.items():
            self._handles.append(parameter.register_hook(partial(self._on_gradient, name)))
            self._handles.append(parameter.register_post_accumulate_grad_hook(partial(self._on_accumulated, name)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        for layer, function in self._checkpoint_functions:
            layer._gradient_checkpointing_func = function  # type: ignore[assignment]
        self._handles.clear()
        self._checkpoint_functions.clear()
        self._passes.clear()
        self._projector = None
        self._mask = None
        self._active = False

    # -- forward ------------------------------------------------------------------------------------------------------

    def _on_model_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if mask is None and args:
            mask = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            found = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"the shield needs a (batch, tokens) attention_mask to know which tokens count, found {found}"
            )
        self._mask = mask

    def _on_layer_output(self, index: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        if not torch.is_grad_enabled():
            return
        if index == 0:
            self._passes.append(_ForwardPass())
        if not hidden.requires_grad:
            return  # nothing below this output trains
        forward = self._passes[-1]
        if index in forward.layers:
            raise LayerLeakError(f"decoder layer {index} ran twice in one forward pass, which has no single anchor")
        assert self._groups is not None
        lower = max(forward.layers, default=None)
        edge = get_gradient_edge(hidden)
        segment = walk_segment(edge, forward.boundaries, lower, self._groups.names)
        if self.dual_backward == "streaming":
            self._check_segment(index, lower, segment)
        self._groups.note_reached(segment.parameters)
        detached = hidden.detach()
        with torch.no_grad():
            penalty = self._penalty.observe(index, detached, self._mask)
        differentiable = None
        if self.dual_backward == "two_pass":
            differentiable = self._penalty.differentiable(index, hidden, self._mask)
        forward.layers[index] = _LayerRecord(edge, segment, detached, detached._version, penalty, differentiable)
        forward.boundaries[edge.node] = index
        # The graph must not own the records, which own the graph.
        enter = partial(_enter_layer, weakref.ref(self), weakref.ref(forward), index)
        for node in segment.nodes:
            node.register_prehook(enter)

    def _check_segment(self, index: int, lower: int | None, segment: GraphSegment) -> None:
        assert self._groups is not None
        if segment.foreign_boundaries:
            raise LayerLeakError(
                f"decoder layer {index} reads the output of layers {segment.foreign_boundaries} directly; "
                'use dual_backward="two_pass"'
            )
        if lower is None:
            return  # the lowest layer's segment runs on into embeddings and projector
        own = f"{LAYER_PREFIX}{index}"
        leaks = [name for name in segment.parameters if self._groups.group_of(name) != own]
        if leaks:
            raise LayerLeakError(
                f"decoder layer {index} depends on {leaks[0]} by another way than the output of layer {lower} "
                f'({len(leaks)} such parameters); use dual_backward="two_pass"'
            )

    # -- backward -----------------------------------------------------------------------------------------------------

    def _enter_layer(self, forward: _ForwardPass, index: int) -> None:
        """Runs before the task's backward pass touches any node of a layer."""
        if forward.layers[index].done:
            return
        if self._projector is None:
            self._begin_backward()
        self._in_reference_pass = True
        try:
            if self.dual_backward == "two_pass":
                self._differentiate_all(forward)
            else:
                for upper in sorted((i for i in forward.layers if i >= index), reverse=True):
                    if not forward.layers[upper].done:
                        self._differentiate_layer(forward, upper)
        finally:
            self._in_reference_pass = False

    def _begin_backward(self) -> None:
        assert self._groups is not None
        self._projector = GradientProjector(self._groups.group_of, self.granularity, self._combiner)
        for forward in self._passes:
            for record in forward.layers.values():
                self._projector.expect(record.segment.parameters)
        # Autograd runs it when this backward pass has delivered its last gradient.
        torch.autograd.Variable._execution_engine.queue_callback(self._finish_backward)

    def _differentiate_layer(self, forward: _ForwardPass, index: int) -> None:
        record = forward.layers[index]
        record.done = True
        if record.hidden._version != record.version:
            raise LayerLeakError(
                f"the output of decoder layer {index} was changed in place after the layer; "
                "its statistics no longer describe it"
            )
        cotangent = record.penalty.cotangent(record.hidden)
        from_above = forward.cotangents.pop(index, None)
        if from_above is not None:
            cotangent = cotangent + from_above
        lower = max((i for i in forward.layers if i < index), default=None)
        below = [] if lower is None else [forward.layers[lower].output]
        inputs: list[Any] = [*below, *record.segment.parameters.values()]
        if not inputs:
            return
        gradients = torch.autograd.grad(
            [record.output],
            inputs,
            grad_outputs=[cotangent],
            retain_graph=True,
            allow_unused=True,
        )
        if lower is not None:
            forward.cotangents[lower] = gradients[0]
        self._add_references(list(record.segment.parameters), gradients[len(below) :])

    def _differentiate_all(self, forward: _ForwardPass) -> None:
        parameters: dict[str, Parameter] = {}
        penalties = []
        for record in forward.layers.values():
            record.done = True
            parameters.update(record.segment.parameters)
            assert record.differentiable_penalty is not None
            penalties.append(record.differentiable_penalty)
        gradients = torch.autograd.grad(
            penalties,
            list(parameters.values()),
            grad_outputs=[torch.ones_like(penalty) for penalty in penalties],
            retain_graph=True,
            allow_unused=True,
        )
        self._add_references(list(parameters), gradients)

    def _add_references(self, names: list[str], gradients: Sequence[Tensor | None]) -> None:
        assert self._projector is not None
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                self._projector.add_reference(name, gradient)

    def _on_gradient(self, name: str, gradient: Tensor) -> None:
        if self._in_reference_pass:
            return
        if self._projector is None:
            # A part above the layers (an output head, an action expert) comes first and knows no reference.
            self._begin_backward()
        assert self._projector is not None and self._groups is not None
        if self._groups.is_protected(name):
            self._projector.on_gradient(name, gradient)

    def _on_accumulated(self, name: str, parameter: Parameter) -> None:
        assert self._projector is not None and self._groups is not None
        if self._groups.is_protected(name):
            self._projector.on_accumulated(name, parameter)

    def _finish_backward(self) -> None:
        projector, self._projector = self._projector, None
        if projector is None:
            return
        groups, scalars = projector.finish()
        entered = [forward for forward in self._passes if any(r.done for r in forward.layers.values())]
        self._passes = [forward for forward in self._passes if forward not in entered]
        penalties = [record.penalty for forward in entered for record in forward.layers.values()]
        dot, task, reference, alpha = scalars.unbind(dim=1)
        empty = torch.zeros(0)
        self.report = ProjectionReport(
            groups=groups,
            dot=dot,
            task_squared_norm=task,
            reference_squared_norm=reference,
            alpha=alpha,
            mean_term=torch.stack([p.mean_term for p in penalties]) if penalties else empty,
            std_term=torch.stack([p.std_term for p in penalties]) if penalties else empty,
            penalty_scale=self.penalty_scale,
        )
        if self.drop_non_finite:
            for group, finite in zip(groups, self.report.is_finite().tolist(), strict=True):
                if not finite:
                    projector.drop(group)

    # -- set-up -------------------------------------------------------------------------------------------------------

    def _current_groups(self) -> ParameterGroups:
        key = tuple(id(p) for p in self.model.parameters() if p.requires_grad)
        if self._groups is None or key != self._groups_key:
            self._groups = ParameterGroups(self.model, self.layers)
            self._groups_key = key
        return self._groups

    def _check_devices(self) -> None:
        devices = sorted({str(p.device) for layer in self.layers for p in layer.parameters()})
        if len(devices) > 1:
            raise ValueError(
                f"the decoder layers are spread over {devices}; projecting a model that is split over several devices "
                "is not supported"
            )

    def _replace_checkpointing(self, index: int, layer: nn.Module) -> None:
        function: Any = layer._gradient_checkpointing_func
        if self.dual_backward == "streaming":
            self._checkpoint_functions.append((layer, function))
            layer._gradient_checkpointing_func = self._recompute  # type: ignore[assignment]
        elif getattr(function, "keywords", {}).get("use_reentrant", False):
            raise ValueError(
                f"decoder layer {index}  is checkpointed with use_reentrant=True and cannot be differentiated twice; "
                'pass gradient_checkpointing_kwargs={"use_reentrant": False}'
            )


def _enter_layer(
    shield: "weakref.ref[GradientShield]", forward: "weakref.ref[_ForwardPass]", index: int, gradients: object
) -> None:
    owner, record = shield(), forward()
    if owner is None or record is None:
        raise RuntimeError(
            "a backward pass went through decoder layers whose shield no longer watches them: run forward and "
            "backward inside one `with shield:` block, and each backward pass once"
        )
    owner._enter_layer(record, index)
