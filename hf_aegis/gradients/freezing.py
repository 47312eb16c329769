"""Freezes what a held subspace cannot hold."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import nn

from hf_aegis.anchors import find_decoder_layers, unwrap_model
from hf_aegis.gradients.linear_sites import find_linear_sites, sites_by_name, subspaces_of


if TYPE_CHECKING:
    from hf_aegis.anchors import ActivationAnchor, InputSubspace


def freeze_unheld(
    model: nn.Module,
    subspaces: "ActivationAnchor | Mapping[str, InputSubspace] | Iterable[InputSubspace]",
    layers: str | nn.ModuleList | None = None,
) -> tuple[str, ...]:
    """
    Freezes every parameter of the anchored stack that is not the weight of a linear with a subspace, as training it
    would change what the decoder makes of the anchored inputs: norm weights, biases and what else the decoder layers
    have; the decoder's embeddings and final norm, and with tied embeddings the output head; biases of linears outside
    of the layers that have a subspace. Low-rank adapters on linears with a subspace go on training.

    The rest of the model (vision tower, action expert, an output head of its own) is left alone. That goes for linears
    before the decoder too: one that trains without a subspace, such as a projector of image features that the anchor
    was collected without, changes the decoder's inputs, and nothing here holds what comes of that. Collect the anchor
    with it (`SubspaceOptions(modules=...)`), or freeze it.

    Args:
        model (`torch.nn.Module`): A Hugging Face model, wrapped or not; its `requires_grad` is changed in place.
        subspaces ([`ActivationAnchor`], or [`InputSubspace`]s): Which linears have a subspace.
        layers (`str` or `torch.nn.ModuleList`, *optional*): Where the decoder layers are, if they cannot be found.

    Returns:
        `tuple[str, ...]`: Names in the unwrapped model of the parameters that trained before.

    Raises:
        ValueError: If linears inside of the decoder layers train and have no subspace, or the model lacks a linear
            that has one.
    """
    held = sites_by_name(model, subspaces_of(subspaces), layers)
    unheld = [
        s.name for s in find_linear_sites(model, layers) if s.in_decoder_layers and s.name not in held and s.trains
    ]
    if unheld:
        raise ValueError(
            f"these linears of the decoder layers train, but the anchor has no subspace of their inputs: {unheld}; "
            "freeze them, collect an anchor in which they run, or pass freeze=False"
        )
    sites = [site for copies in held.values() for site in copies]
    keep = {
        id(parameter)
        for site in sites
        for name, parameter in site.module.named_parameters()
        if name.rpartition(".")[2] != "bias"
    }
    stack = find_decoder_layers(model, layers)
    inner = unwrap_model(model)
    frozen = {
        id(p) for module in (stack, *_beside(inner, stack), *(s.module for s in sites)) for p in module.parameters()
    }
    names = []
    for name, parameter in inner.named_parameters():
        if id(parameter) in frozen - keep and parameter.requires_grad:
            parameter.requires_grad_(False)
            names.append(name)
    return tuple(names)


def _beside(model: nn.Module, stack: nn.ModuleList) -> list[nn.Module]:
    """The input embeddings, and what the decoder has beside its layers: embeddings and norms, but no linears."""
    get = getattr(model, "get_input_embeddings", None)
    found = [get()] if callable(get) else []
    for module in model.modules():
        # By a layer, as the list of them may be one that was made for the call.
        if any(layer is stack[0] for child in module.children() for layer in child.children()):
            # Whole parts of a larger model, such as an action expert, have children of their own.
            found += [c for c in module.children() if not isinstance(c, nn.Linear) and not any(c.children())]
    return found
