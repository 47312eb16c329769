"""Collects the moments of every decoder layer's output over batches, without ever storing hidden states."""

import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_aegis.anchors.decoder_layers import unwrap_model
from hf_aegis.anchors.fingerprint import MOMENTS_POLICIES, decoder_config
from hf_aegis.anchors.linear_layers.inputs import LinearInputs
from hf_aegis.anchors.token_kinds import check_tokens, find_image_token_id, select_tokens
from hf_aegis.functional.moments import Moments, masked_moments, merge_moments
from hf_aegis.hooks import removed_afterwards


@dataclass(frozen=True)
class CollectedMoments:
    """
    Moments of all layers.

    Attributes:
        mean (`Tensor` of shape `(L, D)`): Means, float64.
        variance (`Tensor` of shape `(L, D)`): Population variances, float64.
        num_samples, num_tokens, num_batches (`int`): What was seen.
    """

    mean: Tensor
    variance: Tensor
    num_samples: int
    num_tokens: int
    num_batches: int


class LayerMoments:
    """
    Forward hooks that reduce each layer's output to its masked moments, on the layer's own device.

    Args:
        layers (`nn.ModuleList`):
            The decoder layers.
    """

    def __init__(self, layers: nn.ModuleList):
        self.layers = layers
        self.mask: Tensor | None = None
        self.num_samples = 0
        self._moments: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def attached(self) -> AbstractContextManager[None]:
        """Keeps the hooks on the layers for the duration of the block, whatever happens in it."""
        return removed_afterwards(
            layer.register_forward_hook(lambda _layer, _inputs, output, index=index: self._observe(index, output))
            for index, layer in enumerate(self.layers)
        )

    def start_batch(self, mask: Tensor | None) -> None:
        """Forgets the last batch; `mask` `(B, T)` is the next one's."""
        self.mask = mask
        self._moments.clear()

    def _observe(self, index: int, output: Tensor | tuple[Tensor, ...]) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if index in self._moments:
            raise ValueError(f"decoder layer {index} ran twice in one forward pass: its moments would be ambiguous")
        if self.mask is not None and self.mask.shape != hidden.shape[:-1]:
            raise ValueError(
                f"attention_mask has shape {tuple(self.mask.shape)}, but decoder layer {index} works on "
                f"{tuple(hidden.shape[:-1])} (batch, tokens): the batch's attention_mask must have one entry per token"
            )
        self.num_samples = hidden.shape[0]
        self._moments[index] = masked_moments(hidden, self.mask)

    def batch_moments(self, batch_index: int) -> tuple[Tensor, Tensor, int]:
        """
        What the hooks saw since [`~LayerMoments.start_batch`].

        Returns:
            `tuple[Tensor, Tensor, int]`: mean `(L, D)` and variance `(L, D)` as float64 on the CPU, and the number of
            tokens.

        Raises:
            ValueError: if a layer did not run, no token counted, or a statistic is not finite.
        """
        silent = [index for index in range(len(self.layers)) if index not in self._moments]
        if silent:
            raise ValueError(f"batch {batch_index}: decoder layers {silent} did not run in the forward pass")
        per_layer = [self._moments[index] for index in range(len(self.layers))]
        # One transfer per layer and batch, here and not in the hooks, where it would stall the forward pass.
        rows = torch.stack([torch.stack(moments[:2]).cpu().double() for moments in per_layer])
        count = int(per_layer[0][2])
        if count == 0:
            raise ValueError(
                f"batch {batch_index}: the attention mask leaves no token to count, or none of the chosen kind"
            )
        finite = torch.isfinite(rows).all(dim=-1)
        if not bool(finite.all()):
            layer, row = (int(value) for value in torch.nonzero(~finite)[0])
            statistic = ("mean", "variance")[row]
            raise ValueError(f"batch {batch_index}: decoder layer {layer} has a {statistic} that is not finite")
        return rows[:, 0], rows[:, 1], count


def collect_moments(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    layers: nn.ModuleList,
    *,
    moments: str = "batch",
    tokens: str = "all",
    linear_inputs: LinearInputs | None = None,
    num_batches: int | None = None,
    progress: bool = True,
) -> CollectedMoments:
    """
    Runs the model over the batches and accumulates each layer's moments, and in the same pass what `linear_inputs`
    observes; see [`ActivationAnchor.collect`].

    Raises:
        ValueError: for an unknown policy, a model without image tokens to tell from others, too few batches, a
            mask that does not fit or statistics that are not finite.
    """
    if moments not in MOMENTS_POLICIES:
        raise ValueError(f"moments must be one of {MOMENTS_POLICIES}, found {moments!r}")
    check_tokens(tokens)
    image_token_id = None if tokens == "all" else find_image_token_id(model)
    if num_batches is not None and num_batches < 1:
        raise ValueError(f"num_batches must be at least 1, found {num_batches}")
    observer = LayerMoments(layers)
    device = input_device(model)
    # The language-model head often costs more than all the layers, and its logits are thrown away.
    skips_logits = "logits_to_keep" in inspect.signature(unwrap_model(model).forward).parameters
    if linear_inputs is not None and linear_inputs.observes(output_embeddings(model)):
        skips_logits = False
    total: Moments | None = None
    num_samples = num_tokens = seen = 0
    bar = tqdm(
        itertools.islice(batches, num_batches),
        desc="Collecting anchor",
        total=num_batches or (len(batches) if isinstance(batches, Sized) else None),
        unit="batch",
        disable=not progress,
    )
    observed = nullcontext() if linear_inputs is None else linear_inputs.attached()
    with observer.attached(), observed, evaluation_mode(model), without_cache(decoder_config(model, layers)):
        for seen, batch in enumerate(bar, start=1):
            inputs = forward_inputs(batch, device, batch_index=seen - 1)
            if skips_logits:
                inputs.setdefault("logits_to_keep", 1)
            mask = select_tokens(inputs.get("attention_mask"), inputs.get("input_ids"), tokens, image_token_id)
            observer.start_batch(mask)
            if linear_inputs is not None:
                linear_inputs.start_batch(mask)
            with torch.inference_mode():
                model(**inputs)
            mean, variance, count = observer.batch_moments(seen - 1)
            if linear_inputs is not None:
                linear_inputs.end_batch(seen - 1)
            num_samples += observer.num_samples
            num_tokens += count
            total = _add_batch(total, mean, variance, count, moments)
    if total is None:
        raise ValueError("no batches to collect an anchor from: the iterable is empty")
    if num_batches is not None and seen < num_batches:
        raise ValueError(f"num_batches={num_batches}, but the iterable ended after {seen} batches")
    variance = total.variance if moments == "pooled" else total.m2
    return CollectedMoments(total.mean, variance, num_samples, num_tokens, num_batches=seen)


def _add_batch(total: Moments | None, mean: Tensor, variance: Tensor, count: int, moments: str) -> Moments:
    if moments == "pooled":
        batch = Moments(torch.tensor(float(count), dtype=mean.dtype), mean, variance * count)
        return batch if total is None else merge_moments(total, batch)
    # Running averages over batches, of the mean and (in the place of m2) of the variance.
    if total is None:
        return Moments(torch.ones((), dtype=mean.dtype), mean, variance)
    number = total.count + 1
    return Moments(number, total.mean + (mean - total.mean) / number, total.m2 + (variance - total.m2) / number)


def forward_inputs(batch: Mapping[str, Any], device: torch.device, batch_index: int) -> dict[str, Any]:
    """
    A batch on the model's device, without its labels.

    Raises:
        ValueError: if it is no mapping.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"batch {batch_index} is a {type(batch).__name__}, expected a mapping of the model's forward arguments"
        )
    # Labels would only add a loss, over logits that are not computed.
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if name != "labels"
    }


def input_device(model: nn.Module) -> torch.device:
    """Where a model expects its inputs."""
    base = unwrap_model(model)
    embeddings = base.get_input_embeddings() if callable(getattr(base, "get_input_embeddings", None)) else base  # type: ignore[operator]
    return next(embeddings.parameters()).device


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The language-model head of a model, wrapped or not, if it has one."""
    base = unwrap_model(model)
    return base.get_output_embeddings() if callable(getattr(base, "get_output_embeddings", None)) else None  # type: ignore[operator]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode for the duration of the block, and afterwards in the mode it was in."""
    # Module by module: `model.train()` afterwards would also wake parts that were deliberately left in eval mode.
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def without_cache(config: Any) -> Iterator[None]:
    """A decoder that keeps no keys and values for the duration of the block, as its configuration says."""
    # On the decoder's configuration rather than as an argument: a model that needs its cache (π0) asks for it itself.
    if getattr(config, "use_cache", None) is None:
        yield
        return
    use_cache = config.use_cache
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = use_cache
