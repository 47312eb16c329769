"""Measures, on held-out anchored data, how far a trained model is from what it was."""

import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_aegis.anchors import find_decoder_layers, unwrap_model
from hf_aegis.anchors.collection import evaluation_mode, forward_inputs, input_device
from hf_aegis.functional.moments import check_mask
from hf_aegis.gradients.forward_pass import hidden_output
from hf_aegis.gradients.held_subspace import HeldSubspace
from hf_aegis.gradients.linear_probes import LinearDeviation, LinearProbes
from hf_aegis.gradients.linear_sites import sites_by_name, subspaces_of


if TYPE_CHECKING:
    from hf_aegis.anchors import ActivationAnchor, InputSubspace


@dataclass(frozen=True)
class CertificateReport:
    r"""
    How far a model is from what it was, on held-out anchored batches. Zero throughout means: not at all.

    Attributes:
        layers (`dict[str, float]`): \\(\|H - H_0\| / \|H_0\|\\) of each decoder layer's output over the tokens that
            count, in the Frobenius norm.
        logits (`float`, *optional*): The same of the logits at the samples' last tokens; `None` for a model without.
        divergence (`float`, *optional*): Mean of \\(\mathrm{KL}(p_0 \| p)\\) there, in nats per token.
        linears (`dict[str, LinearDeviation]`): Each held linear's output on a sample of its former inputs.
        tokens (`int`): Number of tokens behind the layers' figures.
    """

    layers: dict[str, float]
    logits: float | None
    divergence: float | None
    linears: dict[str, LinearDeviation]
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and numbers, for JSON."""
        return dataclasses.asdict(self)


class Certificate:
    """
    Remembers what a model does on held-out anchored batches, and measures later how far it went from there: for each
    decoder layer, for the logits, and for each linear whose inputs have a subspace, told apart by what comes from
    inside of the subspace (where a [`HeldSubspace`] lets nothing change) and from outside.

    What is remembered stays on the CPU: a layer's width of numbers for each layer and token, in the layers' dtype, and
    for each linear `tokens_per_linear` inputs and twice as many outputs, in float32, with the bases of the subspaces.
    At PaliGemma2-3B that is about 120 kB for each token and 4 GB for the linears with 256 inputs, and as much as the
    anchor has for the bases.

    ```python
    certificate = Certificate(model, held_out, anchor)
    ...  # train
    report = certificate.measure()
    ```

    Args:
        model (`torch.nn.Module`):
            A Hugging Face model with a stack of decoder layers, wrapped or not, before training. It is run in
            evaluation mode and left in the modes it was in, without the mixed precision of accelerate.
        batches (`Iterable[Mapping[str, Any]]`):
            Forward arguments, few of them, which the anchor has not seen. They are kept. Labels are left out. Tokens
            with a zero in `attention_mask` `(B, T)` do not count.
        subspaces ([`ActivationAnchor`], or [`InputSubspace`]s):
            The subspaces that inside and outside refer to.
        held ([`HeldSubspace`], *optional*):
            What is held: its directions or pairs count as inside. By default all directions of the subspaces do.
        tokens_per_linear (`int`, *optional*, defaults to `256`):
            Most inputs that are sampled for each subspace.
        last_tokens (`int`, *optional*, defaults to `4`):
            Logits are compared at the last so many tokens that count of each sample.
        layers (`str` or `torch.nn.ModuleList`, *optional*):
            Where the decoder layers are, if they cannot be found.
        seed (`int`, *optional*, defaults to `0`):
            Of the samples.

    Raises:
        ValueError: If there are no batches, the attention mask does not fit or leaves no token, a layer or linear does
            not run, a bound is not positive, or the subspaces do not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Mapping[str, Any]],
        subspaces: "ActivationAnchor | Mapping[str, InputSubspace] | Iterable[InputSubspace]",
        *,
        held: HeldSubspace | None = None,
        tokens_per_linear: int = 256,
        last_tokens: int = 4,
        layers: str | nn.ModuleList | None = None,
        seed: int = 0,
    ) -> None:
        for name, value in (("tokens_per_linear", tokens_per_linear), ("last_tokens", last_tokens)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")
        self.model = model
        self.last_tokens = last_tokens
        self._layers = list(find_decoder_layers(model, layers))
        self._batches = list(batches)
        if not self._batches:
            raise ValueError("no batches to certify on: the iterable is empty")
        groups = subspaces_of(subspaces)
        sites = sites_by_name(model, groups, layers)
        stored = {name: group.basis.shape[1] for group in groups for name in group.linears}
        ranks, pairs = (stored, {}) if held is None else (held.ranks, held.pairs)
        if unknown := sorted(set(stored) - set(ranks)):
            raise ValueError(f"held: of another anchor, without the linear {unknown[0]!r}, which has a subspace")
        self._probes = LinearProbes(sites, groups, ranks, pairs, tokens_per_linear, seed)
        self._picks_logits = "logits_to_keep" in inspect.signature(unwrap_model(model).forward).parameters
        with evaluation_mode(model), self._probes.sampling():
            self._before = [self._run(index, batch) for index, batch in enumerate(self._batches)]

    def measure(self) -> CertificateReport:
        """Runs the batches again and compares. All processes that share the model's weights have to call it."""
        layers = [_Deviation() for _ in self._layers]
        logits, divergences = _Deviation(), []
        with evaluation_mode(self.model):
            for index, (hidden_before, logits_before) in enumerate(self._before):
                hidden, logits_now = self._run(index, self._batches[index])
                for deviation, now, before in zip(layers, hidden, hidden_before, strict=True):
                    deviation.add(now, before)
                if logits_now is not None and logits_before is not None:
                    logits.add(logits_now, logits_before)
                    divergences.append(_divergence(logits_before, logits_now))
            linears = self._probes.deviations()
        return CertificateReport(
            layers={f"layers.{index}": deviation.relative() for index, deviation in enumerate(layers)},
            logits=logits.relative() if divergences else None,
            divergence=float(torch.cat(divergences).mean()) if divergences else None,
            linears=linears,
            tokens=sum(hidden[0].shape[0] for hidden, _ in self._before),
        )

    def _run(self, index: int, batch: Mapping[str, Any]) -> tuple[list[Tensor], Tensor | None]:
        """Each layer's output `(N, D)` at the tokens that count, and the logits `(M, V)` of the last ones."""
        inputs = forward_inputs(batch, input_device(self.model), index)
        mask = inputs.get("attention_mask")
        if mask is not None and not bool((mask != 0).any()):
            raise ValueError(f"batch {index}: the attention mask leaves no token to compare")
        self._probes.mask = mask
        outputs: dict[int, Tensor] = {}

        def keep(number: int, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if number in outputs:
                raise ValueError(f"decoder layer {number} ran twice in one forward pass")
            outputs[number] = _chosen(hidden_output(output).detach(), mask).cpu()

        compared = None if mask is None else last_of(mask, mask, self.last_tokens)
        if self._picks_logits and "logits_to_keep" not in inputs:
            # The head over the whole vocabulary costs most: it runs where some sample's logits are compared.
            positions: Any = self.last_tokens
            if compared is not None:
                positions = compared.any(0).nonzero()[:, 0]
                compared = compared[:, positions]
            inputs["logits_to_keep"] = positions
        # Mixed precision that accelerate puts on the model for training would count as a change of it.
        forward = vars(self.model).get("_original_forward", self.model)
        hooks = [layer.register_forward_hook(partial(keep, i)) for i, layer in enumerate(self._layers)]
        try:
            with torch.no_grad():
                result = forward(**inputs)
        finally:
            for hook in hooks:
                hook.remove()
        if silent := [number for number in range(len(self._layers)) if number not in outputs]:
            raise ValueError(f"decoder layers {silent} did not run in the forward pass")
        logits = getattr(result, "logits", None)
        if isinstance(logits, Tensor):
            chosen = last_of(None, logits, self.last_tokens) if compared is None else compared
            logits = _chosen(logits, chosen).cpu()
        return [outputs[number] for number in range(len(self._layers))], logits


def last_of(mask: Tensor | None, values: Tensor, count: int) -> Tensor:
    """
    Where the last tokens of each sample are.

    Args:
        mask (`Tensor` of shape `(B, T)`, *optional*): Non-zero where a token counts; all by default.
        values (`Tensor` of shape `(B, T, ...)`): Gives the shape where there is no mask.
        count (`int`): How many of each sample's tokens that count, at most.

    Returns:
        `Tensor` of shape `(B, T)`: booleans.
    """
    counts = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device) if mask is None else mask != 0
    from_behind = counts.flip(-1).cumsum(-1).flip(-1)
    return counts & (from_behind <= count)


def _chosen(values: Tensor, mask: Tensor | None) -> Tensor:
    check_mask(values, mask)
    return values.flatten(0, 1) if mask is None else values[(mask != 0).to(values.device)]


def _divergence(before: Tensor, now: Tensor) -> Tensor:
    """KL(p₀‖p) in nats for each row of logits, `(M,)`."""
    log_before, log_now = before.double().log_softmax(-1), now.double().log_softmax(-1)
    return (log_before.exp() * (log_before - log_now)).sum(-1)


class _Deviation:
    """A relative difference in the Frobenius norm over tensors that come one by one."""

    def __init__(self) -> None:
        self._away = self._whole = 0.0

    def add(self, now: Tensor, before: Tensor) -> None:
        self._away += float((now.double() - before.double()).square().sum())
        self._whole += float(before.double().square().sum())

    def relative(self) -> float:
        return (self._away / self._whole) ** 0.5 if self._whole > 0 else 0.0
