"""Losses on the decoder layers' outputs, added to the task's loss and differentiated with it."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_aegis.anchors import find_decoder_layers, unwrap_model
from hf_aegis.functional.bures import DEFAULT_EPS
from hf_aegis.functional.moments import check_mask
from hf_aegis.gradients.data_parallel import (
    LayerMoments,
    MomentsExchange,
    ProjectionScope,
    as_share,
    find_process_group,
    total_over_processes,
)
from hf_aegis.gradients.forward_pass import hidden_output
from hf_aegis.gradients.recompute import AmbientState
from hf_aegis.gradients.reference import TransportPenalty
from hf_aegis.gradients.token_mask import TokenMask
from hf_aegis.hooks import removed_afterwards


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from hf_aegis.anchors import ActivationAnchor


class LayerRecorder:
    """
    Keeps each decoder layer's output, with its graph, and which tokens count, of one forward pass.

    Args:
        layers (`Sequence[torch.nn.Module]`): The decoder layers, first to last.
        token_mask ([`TokenMask`]): Follows the calls of the model that they belong to.
    """

    def __init__(self, layers: Sequence[nn.Module], token_mask: TokenMask) -> None:
        self.layers = layers
        self.token_mask = token_mask
        self._outputs: dict[int, tuple[Tensor, Tensor | None]] = {}

    def attach(self) -> list[RemovableHandle]:
        """Forgets the last forward pass and hooks the layers; the caller removes the hooks."""
        self._outputs.clear()
        hooks = [layer.register_forward_hook(partial(self._keep, index)) for index, layer in enumerate(self.layers)]
        return [*self.token_mask.follow(), *hooks]

    def take(self) -> list[tuple[Tensor, Tensor | None]]:
        """
        Each layer's output `(B, T, D)` and the mask `(B, T)` of its tokens. The recorder lets go of them, so that they
        do not outlive the step.

        Raises:
            RuntimeError: If a layer did not run since.
        """
        silent = [index for index in range(len(self.layers)) if index not in self._outputs]
        if silent:
            raise RuntimeError(
                f"no output of decoder layers {silent} was recorded: run one forward pass with gradients inside "
                "`with loss.recording():` for each call of `value()`"
            )
        outputs, self._outputs = self._outputs, {}
        return [outputs[index] for index in range(len(self.layers))]

    def _keep(self, index: int, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.is_grad_enabled():
            return  # an evaluation on the way
        if index in self._outputs:
            raise ValueError(
                f"decoder layer {index} ran twice while it was recorded; record one forward pass at a time"
            )
        self._outputs[index] = (hidden_output(output), self.token_mask.current())


class TransportLoss:
    r"""
    The transport penalty \\(\sum_l W_l\\) of an anchor (arXiv 2604.16067, §3.2) as a loss, instead of as a direction
    to be projected against.

    ```python
    transport = TransportLoss(model, anchor)
    with transport.recording():
        loss = model(**batch).loss
    (loss + scale * transport.value()).backward()
    ```

    Args:
        model (`torch.nn.Module`):
            Any Hugging Face model with a stack of decoder layers, possibly wrapped by PEFT.
        anchor ([`ActivationAnchor`]):
            Statistics of the pre-trained model's layers. It says which kind of tokens count, too.
        layers (`str` or `torch.nn.ModuleList`, *optional*):
            Where the decoder layers are, if they cannot be found.
        variance_eps (`float`, *optional*, defaults to `1e-6`):
            Added to variances under the square root.
        scope (`"global"` or `"rank"`, *optional*, defaults to `"global"`):
            Where several processes share a batch: whether the statistics are those of the whole batch, so that the
            penalty's gradient, averaged over processes like the task's, is that of one process with all of it; or
            those of each process's own tokens.
        process_group (`torch.distributed.ProcessGroup`, *optional*):
            The processes that share the batch; by default that of a `DistributedDataParallel`, else all processes, if
            torch.distributed was initialised.

    Raises:
        ValueError: If the layers are not found, or the anchor has another shape.
    """

    def __init__(
        self,
        model: nn.Module,
        anchor: "ActivationAnchor",
        layers: str | nn.ModuleList | None = None,
        variance_eps: float = DEFAULT_EPS,
        scope: ProjectionScope = "global",
        process_group: "ProcessGroup | None" = None,
    ) -> None:
        self.model = model
        self.scope = scope
        self.process_group = process_group
        anchor.check_compatible(model, check="shape", layers=layers)
        self._penalty = TransportPenalty(anchor, eps=variance_eps)
        self._recorder = LayerRecorder(
            list(find_decoder_layers(model, layers)), TokenMask(model, anchor.fingerprint.tokens)
        )

    @contextmanager
    def recording(self) -> Iterator[None]:
        """The forward pass with gradients in this block is the one whose loss `value()` is."""
        with removed_afterwards(self._recorder.attach()):
            yield

    def value(self) -> Tensor:
        """
        The unscaled penalty of the recorded forward pass, `()`, with its graph; once for each recording. In all
        processes that share a batch it is that of the whole batch, and all must ask for it.
        """
        outputs = self._recorder.take()
        processes = find_process_group(self.model, self.process_group) if self.scope == "global" else None
        others: Sequence[LayerMoments | None] = [None] * len(outputs)
        if processes is not None:
            with torch.no_grad():
                moments = [LayerMoments.of(hidden, mask) for hidden, mask in outputs]
            others = MomentsExchange(processes)(moments).others
        terms = [
            self._penalty.differentiable(index, hidden, mask, rest)
            for index, ((hidden, mask), rest) in enumerate(zip(outputs, others, strict=True))
        ]
        return as_share(torch.stack([term.to(terms[0].device) for term in terms]).sum(), processes)


class DistillationLoss:
    r"""
    Feature distillation to the model as it is when this is made: the mean over layers of the mean squared difference
    of their outputs, over attended tokens and hidden dimensions,
    \\(\frac{1}{L} \sum_l \frac{1}{N D} \sum m (H_l - H^*_l)^2\\).

    The frozen teacher is a copy of the model's base model, kept beside the model and not in it: it is neither trained
    nor saved. It costs its memory, and a forward pass without gradients in each `value()`. It runs in evaluation mode
    on what the model's base model was called with. Used like [`TransportLoss`].

    Args:
        model (`torch.nn.Module`):
            Any Hugging Face model with a stack of decoder layers, possibly wrapped by PEFT, with pre-trained weights.
        layers (`str` or `torch.nn.ModuleList`, *optional*):
            Where the decoder layers are, if they cannot be found.
        process_group (`torch.distributed.ProcessGroup`, *optional*):
            As in [`TransportLoss`]. Each process weights its tokens by their share in the whole batch, so that the
            mean of the processes' losses is the loss of the whole batch.

    Attributes:
        teacher (`torch.nn.Module`): The frozen base model.

    Raises:
        ValueError: If the layers are not found, or not in the base model; while recording, if the model is called with
            a cache of keys and values, which the teacher cannot share.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str | nn.ModuleList | None = None,
        process_group: "ProcessGroup | None" = None,
    ) -> None:
        self.model = model
        self.process_group = process_group
        found = find_decoder_layers(model, layers)
        inner = unwrap_model(model)
        self._student = getattr(inner, "base_model", inner)
        names = {id(module): name for name, module in self._student.named_modules()}
        if any(id(layer) not in names for layer in found):
            raise ValueError(
                f"the decoder layers are not in the base model of {type(inner).__name__}, a "
                f"{type(self._student).__name__}, which is what the teacher is a copy of"
            )
        self.teacher: nn.Module = copy.deepcopy(self._student).requires_grad_(False).eval()
        self._teacher_layers = [self.teacher.get_submodule(names[id(layer)]) for layer in found]
        for module in self.teacher.modules():
            config: Any = getattr(module, "config", None)
            if getattr(config, "use_cache", False):
                config.use_cache = False  # the teacher's own copy
        self._recorder = LayerRecorder(list(found), TokenMask(model))
        self._call: tuple[tuple[Any, ...], dict[str, Any], AmbientState] | None = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """The forward pass with gradients in this block is the one whose loss `value()` is."""
        self._call = None
        hook = self._student.register_forward_pre_hook(self._keep_call, with_kwargs=True)
        with removed_afterwards([hook, *self._recorder.attach()]):
            yield

    def value(self) -> Tensor:
        """The loss of the recorded forward pass, `()`, with its graph; once for each recording."""
        outputs = self._recorder.take()
        assert self._call is not None, "layers of the base model ran, so it was called"
        (args, kwargs, ambient), self._call = self._call, None
        if next(self.teacher.parameters()).device != (device := outputs[0][0].device):
            self.teacher.to(device)
        terms: dict[int, Tensor] = {}

        def compare(index: int, layer: nn.Module, _: tuple[Any, ...], output: Any) -> None:
            # As soon as the teacher's output is there, so that no second set of hidden states is kept.
            with torch.enable_grad():
                terms[index] = masked_mean_square(outputs[index][0], hidden_output(output), outputs[index][1])

        hooks = [layer.register_forward_hook(partial(compare, i)) for i, layer in enumerate(self._teacher_layers)]
        with removed_afterwards(hooks), ambient.restored(), torch.no_grad():
            self.teacher(*args, **kwargs)
        losses = torch.stack([terms[index].to(terms[0].device) for index in range(len(terms))])
        return (losses * self._shares(outputs).to(losses)).mean()

    def _shares(self, outputs: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
        """This process's share of each layer's tokens, times the number of processes, `(L,)`."""
        processes = find_process_group(self.model, self.process_group)
        if processes is None:
            return torch.ones(len(outputs))
        device = outputs[0][0].device
        counts = [
            hidden.new_tensor(hidden.shape[:2].numel(), dtype=torch.float32) if mask is None else (mask != 0).sum()
            for hidden, mask in outputs
        ]
        mine = torch.stack([count.to(device, torch.float32) for count in counts])
        return mine * processes.size() / total_over_processes(mine, processes).clamp(min=1)

    def _keep_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        if kwargs.get("past_key_values") is not None:
            raise ValueError("the model was called with past_key_values, which the teacher of a distillation lacks")
        tensors = tuple(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        self._call = (args, dict(kwargs), AmbientState(tensors))


def masked_mean_square(hidden: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """
    Mean of `(hidden - target)²` over hidden dimensions and the tokens that count.

    Args:
        hidden, target (`Tensor` of shape `(B, T, D)`): Hidden states.
        mask (`Tensor` of shape `(B, T)`, *optional*): True (or non-zero) where a token counts; all by default.

    Returns:
        `Tensor` of shape `()`, in float32 or better. Zero without a token. What masked positions hold, NaN included,
        has no influence.

    Raises:
        ValueError: If the shapes do not belong together.
    """
    check_mask(hidden, mask)
    if target.shape != hidden.shape:
        raise ValueError(f"hidden states {tuple(hidden.shape)} and their target {tuple(target.shape)} differ in shape")
    wide = torch.promote_types(hidden.dtype, torch.float32)
    difference = hidden.to(wide) - target.to(hidden.device, wide)
    if mask is None:
        return difference.square().mean()
    keep = (mask != 0).to(hidden.device)
    difference = difference.masked_fill(~keep.unsqueeze(-1), 0.0)
    return difference.square().sum() / (keep.sum().clamp(min=1) * hidden.shape[-1])
