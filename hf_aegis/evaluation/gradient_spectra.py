"""Singular values of what two losses ask of a model's decoder layers (arXiv 2604.16067, spectral analysis)."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hf_aegis.anchors import find_decoder_layers
from hf_aegis.evaluation.evaluating import evaluating


Batches = Iterable[Mapping[str, Any]]


def gradient_spectra(
    model: nn.Module,
    vqa_batches: Batches,
    flow_batches: Batches,
    layers: str | nn.ModuleList | None = None,
) -> dict[str, Any]:
    """
    Singular values of the gradients of the mean VQA cross-entropy and of the mean flow-matching loss, for every weight
    of two or more dimensions in the decoder layers, whether it trains or not.

    The model runs in evaluation mode. It is left as it was: parameters, their gradients, the modes of all modules, and
    the random state, from which a flow batch without `noise` and `timestep` draws them.

    Args:
        model (`torch.nn.Module`):
            Takes a batch's items as keywords and returns an output with a `loss`. Where that has a `flow_mse`, the
            flow loss without its scale, it goes first.
        vqa_batches (`Iterable[Mapping]`): Teacher-forced inputs, as [`~data.vqa.VQACollator`] makes them.
        flow_batches (`Iterable[Mapping]`): With actions, as the collator of the robot data makes them.
        layers (`str` or `torch.nn.ModuleList`, *optional*): Where the decoder layers are, if they cannot be found.

    Returns:
        `dict`: Ready for JSON. `samples` and `flow_samples`, the rows of the batches, and `layers`, lowest first, each
        with its `name` and `matrices`: for every weight's name in the layer the singular values, largest first, under
        `cross_entropy` and `flow`. They are zero where a loss does not reach a weight.

    Raises:
        ValueError: If there are no batches, an output has no loss, or the layers are not found.
    """
    matrices = {
        (index, name.removesuffix(".weight")): parameter
        for index, layer in enumerate(find_decoder_layers(model, layers))
        for name, parameter in layer.named_parameters()
        if parameter.ndim >= 2 and parameter.is_floating_point()
    }
    weights = list(matrices.values())
    with evaluating(model) as device, torch.enable_grad(), _differentiated(weights):
        answered, samples = _spectra(model, weights, vqa_batches, device, "VQA batches")
        acted, flow_samples = _spectra(model, weights, flow_batches, device, "flow batches")
    found: dict[int, dict[str, dict[str, list[float]]]] = {}
    for (index, name), cross_entropy, flow in zip(matrices, answered, acted, strict=True):
        found.setdefault(index, {})[name] = {"cross_entropy": cross_entropy, "flow": flow}
    return {
        "samples": samples,
        "flow_samples": flow_samples,
        "layers": [{"name": f"layers.{index}", "matrices": layer} for index, layer in found.items()],
    }


def _spectra(
    model: nn.Module, weights: list[nn.Parameter], batches: Batches, device: torch.device, description: str
) -> tuple[list[list[float]], int]:
    """Singular values of the mean loss's gradients, one list per weight, and the number of samples."""
    sums = [torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) for weight in weights]
    samples = 0
    for batch in tqdm(batches, desc=f"gradients of {description}", leave=False, disable=None):
        output = model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
        flow_mse = getattr(output, "flow_mse", None)
        loss = flow_mse if flow_mse is not None else output.loss
        if loss is None:
            raise ValueError(f"{description}: {type(model).__name__} gave no loss for a batch of {', '.join(batch)}")
        size = len(next(value for value in batch.values() if isinstance(value, Tensor)))
        # Never through `.grad`: what training left there stays.
        for total, gradient in zip(sums, torch.autograd.grad(loss, weights, allow_unused=True), strict=True):
            if gradient is not None:
                total.add_(gradient.float(), alpha=size)
        samples += size
    if not samples:
        raise ValueError(f"{description}: there are none")
    return [torch.linalg.svdvals(total.flatten(1) / samples).tolist() for total in sums], samples


@contextmanager
def _differentiated(weights: list[nn.Parameter]) -> Iterator[None]:
    """Asks for gradients of all `weights`, of frozen ones too."""
    frozen = [weight for weight in weights if not weight.requires_grad]
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
