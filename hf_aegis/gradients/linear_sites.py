"""The linear layers of a model under the names that an anchor's subspaces have for them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_aegis.anchors import ActivationAnchor, find_decoder_layers, unwrap_model
from hf_aegis.anchors.linear_layers.names import LAYERS_PREFIX, called_module, named_linears


if TYPE_CHECKING:
    from hf_aegis.anchors import InputSubspace


# A basis stored in bfloat16 is not quite orthonormal; one that is further off is something else.
_ROUNDING = 0.05


@dataclass(frozen=True)
class LinearSite:
    """
    A linear layer, possibly with adapters on it.

    Attributes:
        name (`str`): As in an anchor, see [`~anchors.linear_layers.names.named_linears`].
        module (`torch.nn.Module`): What the model calls there: the linear, or PEFT's tuner layer around it.
    """

    name: str
    module: nn.Module

    @property
    def linear(self) -> nn.Module:
        """The linear itself."""
        return getattr(self.module, "base_layer", self.module)

    @property
    def has_adapters(self) -> bool:
        """Whether PEFT's tuner layer is around the linear."""
        return self.linear is not self.module

    @property
    def trains(self) -> bool:
        """Whether anything but a bias trains here: the weight, or an adapter."""
        parameters = self.module.named_parameters()
        return any(p.requires_grad for name, p in parameters if name.rpartition(".")[2] != "bias")

    @property
    def in_decoder_layers(self) -> bool:
        """Whether the linear is inside of one of the decoder layers."""
        return self.name.startswith(LAYERS_PREFIX)


def find_linear_sites(model: nn.Module, layers: str | nn.ModuleList | None = None) -> list[LinearSite]:
    """
    Every linear layer of a model.

    A module that PEFT copied for training (`modules_to_save`) counts as its copies, which are what runs, so that a
    name can occur more than once.

    Args:
        model (`torch.nn.Module`): A Hugging Face model, wrapped or not.
        layers (`str` or `torch.nn.ModuleList`, *optional*): Where the decoder layers are, if they cannot be found.

    Returns:
        `list[LinearSite]`: Those of the decoder layers first.

    Raises:
        ValueError: If the decoder layers are not found.
    """
    linears = named_linears(model, find_decoder_layers(model, layers), copies=True)
    return [LinearSite(name, called_module(module)) for name, module in linears]


def subspaces_of(
    source: "ActivationAnchor | Mapping[str, InputSubspace] | Iterable[InputSubspace]",
) -> list["InputSubspace"]:
    """
    The subspaces in an anchor, a mapping or an iterable of them.

    Raises:
        ValueError: If there are none, or two of them are for the same linear.
    """
    if isinstance(source, ActivationAnchor):
        subspaces = list(source.subspaces.values())
        if not subspaces:
            raise ValueError("this anchor was collected without subspaces: give collect() subspaces=SubspaceOptions()")
    else:
        subspaces = list(source.values() if isinstance(source, Mapping) else source)
        if not subspaces:
            raise ValueError("no subspaces were given")
    seen: set[str] = set()
    for name in (name for subspace in subspaces for name in subspace.linears):
        if name in seen:
            raise ValueError(f"two subspaces are for the linear {name!r}")
        seen.add(name)
    return subspaces


def sites_by_name(
    model: nn.Module, subspaces: Iterable["InputSubspace"], layers: str | nn.ModuleList | None = None
) -> dict[str, list[LinearSite]]:
    """
    The linears that subspaces are for.

    Returns:
        `dict[str, list[LinearSite]]`: By name, in the subspaces' order; where PEFT made copies, all of them,
        first the one that runs.

    Raises:
        ValueError: If the model lacks one of the linears, or its inputs have another width than the subspace.
    """
    found: dict[str, list[LinearSite]] = {}
    for site in find_linear_sites(model, layers):
        found.setdefault(site.name, []).append(site)
    chosen = {}
    for subspace in subspaces:
        width = subspace.basis.shape[0]
        for name in subspace.linears:
            if name not in found:
                raise ValueError(
                    f"{type(unwrap_model(model)).__name__} has no linear {name!r}, which a subspace is for"
                )
            for site in found[name]:
                if site.linear.in_features != width:
                    raise ValueError(
                        f"{name!r} has inputs of width {site.linear.in_features}, but its subspace has {width}"
                    )
            chosen[name] = found[name]
    return chosen


def orthonormal_basis(subspace: "InputSubspace") -> Tensor:
    """A subspace's basis `(in, k)` as [`orthonormal`] makes it."""
    return orthonormal(subspace.basis, repr(subspace.linears[0]))


def orthonormal(basis: Tensor, what: str) -> Tensor:
    """
    A basis `(D, k)` in float64 on the CPU, orthonormal to rounding even where it is stored in bfloat16; its first
    columns go on spanning what they spanned.

    Args:
        basis (`Tensor` of shape `(D, k)`): As it is stored.
        what (`str`): What it is for; for the error.

    Raises:
        ValueError: If the stored basis is further from orthonormal than rounding explains.
    """
    columns, triangle = torch.linalg.qr(basis.detach().cpu().double())
    # Not `sign`, which is zero for a column of zeros.
    signs = torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(triangle)
    away = float((triangle - signs.diag()).abs().max())
    if not away < _ROUNDING:
        raise ValueError(f"the basis for {what} is not orthonormal: columns are off by {away:.2g}")
    return columns * signs
