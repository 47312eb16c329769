"""Collects the moments of every decoder layer's output over batches, without ever storing hidden states."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hf_aegis.anchors.decoder_layers import unwrap_model
from hf_aegis.anchors.fingerprint import MOMENTS_POLICIES, decoder_config
from hf_aegis.anchors.linear_layers.inputs import LinearInputs
from hf_aegis.anchors.moments_observer import MomentsObserver
from hf_aegis.anchors.moments_over_batches import CollectedMoments, MomentsOverBatches
from hf_aegis.anchors.passes import Passes
from hf_aegis.anchors.token_kinds import check_tokens, find_image_token_id, select_tokens


def collect_moments(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    layers: nn.ModuleList,
    *,
    moments: str = "batch",
    tokens: str = "all",
    linear_inputs: LinearInputs | None = None,
    passes: Passes | None = None,
) -> CollectedMoments:
    """
    Runs the model over the batches and accumulates each layer's moments, and in the same pass what `linear_inputs`
    observes; see [`ActivationAnchor.collect`]. Processes that share the batches all get the moments over all of them;
    `linear_inputs` stays with its own process.

    Raises:
        ValueError: for an unknown policy, a model without image tokens to tell from others, too few batches, a
            mask that does not fit or statistics that are not finite.
    """
    if moments not in MOMENTS_POLICIES:
        raise ValueError(f"moments must be one of {MOMENTS_POLICIES}, found {moments!r}")
    check_tokens(tokens)
    passes = passes or Passes()
    image_token_id = None if tokens == "all" else find_image_token_id(model)
    observer = MomentsObserver(layers)
    device = input_device(model)
    # The language-model head often costs more than all the layers, and its logits are thrown away.
    skips_logits = "logits_to_keep" in inspect.signature(unwrap_model(model).forward).parameters
    if linear_inputs is not None and linear_inputs.observes(output_embeddings(model)):
        skips_logits = False
    total = MomentsOverBatches(moments, linear_inputs)
    observed = nullcontext() if linear_inputs is None else linear_inputs.attached()
    with observer.attached(), observed, evaluation_mode(model), without_cache(decoder_config(model, layers)):
        for number, batch in passes.over(batches, "moments", total):
            inputs = forward_inputs(batch, device, batch_index=number)
            if skips_logits:
                inputs.setdefault("logits_to_keep", 1)
            mask = select_tokens(inputs.get("attention_mask"), inputs.get("input_ids"), tokens, image_token_id)
            observer.start_batch(mask)
            if linear_inputs is not None:
                linear_inputs.start_batch(mask)
            with torch.inference_mode():
                model(**inputs)
            mean, variance, count = observer.batch_moments(number)
            if linear_inputs is not None:
                linear_inputs.end_batch(number)
            total.add(mean, variance, count, observer.num_samples)
    return total.over_processes(passes.share)


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
