"""What is held in place of a [`HeldSubspace`] where there are only shapes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_aegis.anchors import ActivationAnchor, SubspaceOptions
from hf_aegis.gradients.freezing import freeze_unheld
from hf_aegis.gradients.held_pairs import choose_pairs
from hf_aegis.gradients.held_subspace import subspace_ranks
from hf_aegis.gradients.held_weight import HeldWeight, local_rows
from hf_aegis.gradients.linear_sites import LinearSite, find_linear_sites, sites_by_name, subspaces_of
from hf_aegis.training.aegis_config import AEGISConfig


# Linear layers of a decoder layer that read one input.
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class HeldDirections:
    """
    Directions that are held of linear layers which read one input.

    Attributes:
        width (`int`): Of the input.
        rank (`int`): Directions of the basis that they share.
        linears (`dict[str, tuple[int, int | None]]`):
            By name, the input directions, and with pairs the output directions, of which any is held.
    """

    width: int
    rank: int
    linears: Mapping[str, tuple[int, int | None]]


def directions_of(anchor: ActivationAnchor, model: nn.Module, args: AEGISConfig) -> list[HeldDirections]:
    """
    The directions that a training with an anchor would hold.

    Raises:
        ValueError: As of [`HeldSubspace`].
    """
    groups = subspaces_of(anchor)
    sites = sites_by_name(model, groups, args.decoder_layers)
    energy: Any = args.subspace_energy
    if args.subspace_energies:
        energy = args.subspace_energies | {"*": 1.0 if energy is None else energy}
    ranks = subspace_ranks(groups, energy)
    pairs = {}
    if args.subspace_sensitivity is not None:
        pairs = choose_pairs(anchor, sites, groups, ranks, args.subspace_sensitivity)
    found = []
    for group in groups:
        linears: dict[str, tuple[int, int | None]] = {}
        for name in group.linears:
            linears[name] = (ranks[name], None)
            if name in pairs:
                rows, columns = (int(pairs[name].mask.any(dim).sum()) for dim in (1, 0))
                linears[name] = (columns, rows)
        found.append(HeldDirections(group.basis.shape[0], max(ranks[name] for name in group.linears), linears))
    return found


def most_directions(model: nn.Module, args: AEGISConfig, options: SubspaceOptions) -> list[HeldDirections]:
    """The directions that a training with an anchor of these options would hold at most."""
    groups: dict[tuple[str, ...], list[LinearSite]] = {}
    for site in (s for s in find_linear_sites(model, args.decoder_layers) if s.in_decoder_layers):
        parent, _, own = site.name.rpartition(".")
        key = next((together for together in _TOGETHER if own in together), (own,))
        groups.setdefault((parent, *key), []).append(site)
    found = []
    for sites in groups.values():
        first: Any = sites[0].linear
        width = first.in_features
        rank = min(width, options.max_rank)
        pairs = args.subspace_sensitivity is not None
        linears: dict[str, tuple[int, int | None]] = {}
        for site in sites:
            linear: Any = site.linear
            linears[site.name] = (rank, min(linear.out_features, options.max_output_rank) if pairs else None)
        found.append(HeldDirections(width, rank, linears))
    return found


@dataclass(frozen=True)
class _Subspace:
    linears: tuple[str, ...]
    basis: Tensor


class HeldShapes:
    """
    Does to weights what [`HeldSubspace`] does, with bases of the right shapes.

    Args:
        model (`torch.nn.Module`): What is trained.
        args ([`AEGISConfig`]): Says what is held, and whether the rest is frozen.
        directions (`list[HeldDirections]`): How many.
    """

    def __init__(self, model: nn.Module, args: AEGISConfig, directions: list[HeldDirections]) -> None:
        self.weights: list[HeldWeight] = []
        subspaces = [_Subspace(tuple(d.linears), torch.empty(d.width, d.rank)) for d in directions]
        sites = sites_by_name(model, subspaces, args.decoder_layers)  # type: ignore[arg-type]
        for subspace, held in zip(subspaces, directions, strict=True):
            for name, (rank, outputs) in held.linears.items():
                self.weights += [
                    HeldWeight(linear, *self._tensors(linear, subspace.basis, rank, outputs, args.subspace_softness))
                    for site in sites[name]
                    for linear in _held_parts(site)
                ]
        if args.freeze_unheld:
            freeze_unheld(model, subspaces, args.decoder_layers)  # type: ignore[arg-type]

    @property
    def tensors(self) -> list[Tensor | None]:
        """All that is kept for it."""
        return [t for w in self.weights for t in (w.basis, w.target, w.share, w.output_basis)]

    def restore(self) -> None:
        """Restores the weights."""
        for weight in self.weights:
            weight.restore()

    @staticmethod
    def _tensors(
        linear: nn.Module, basis: Tensor, rank: int, outputs: int | None, softness: float
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        rows = local_rows(linear)
        if outputs is None:
            share = basis.new_empty(rank) if softness else None
            return basis[:, :rank], basis.new_empty(rows.shape[0], rank), share, None
        # Which columns are held differs between linears, so that each has a basis of its own.
        mask = torch.empty(outputs, rank, dtype=torch.bool)
        return (
            basis[:, :rank].clone(),
            basis.new_empty(outputs, rank),
            mask,
            basis.new_empty(rows.shape[0], outputs),
        )


def _held_parts(site: LinearSite) -> list[Any]:
    """What of a linear layer is held: its weight, or its adapters' first matrices."""
    if site.has_adapters:
        module: Any = site.module
        return list(module.lora_A.values())
    return [site.linear] if site.linear.weight.requires_grad else []
