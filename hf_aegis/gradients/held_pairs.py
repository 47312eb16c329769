"""Which pairs of an output and an input direction of linear layers' weights are held."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_aegis.gradients.linear_sites import LinearSite, orthonormal


if TYPE_CHECKING:
    from hf_aegis.anchors import InputSubspace
    from hf_aegis.anchors.linear_layers.sensitivities import PairSensitivity


@dataclass(frozen=True, eq=False)
class HeldPairs:
    r"""
    The pairs \\((i, j)\\) for which \\(v_i^\top W u_j\\) of a linear layer's weight \\(W\\) is held.

    Attributes:
        sensitivity ([`PairSensitivity`]): Has the output directions \\(v_i\\), `(out, m)`.
        mask (`Tensor` of shape `(m, k)`): Booleans on the CPU: true where a pair is held.
    """

    sensitivity: "PairSensitivity"
    mask: Tensor

    def compact(self) -> tuple[Tensor, Tensor, Tensor]:
        """
        What is left without the directions of which no pair is held.

        Returns:
            `tuple[Tensor, Tensor, Tensor]`: orthonormal output directions `(out, m')` in float64, the indices `(k',)`
            of the input directions, and the mask `(m', k')` of their pairs; all on the CPU.
        """
        rows, columns = (self.mask.any(dim).nonzero()[:, 0] for dim in (1, 0))
        outputs = orthonormal(self.sensitivity.output_basis, f"outputs of {self.sensitivity.linear!r}")
        return outputs[:, rows], columns, self.mask[rows][:, columns]


def choose_pairs(
    source: Any,
    sites: Mapping[str, list[LinearSite]],
    subspaces: Iterable["InputSubspace"],
    ranks: Mapping[str, int],
    share: float,
) -> dict[str, HeldPairs]:
    """
    The pairs to hold of the linears that train: those of the largest sensitivities, over all of these linears together
    by one threshold, until they add up to a share of the sum.

    Args:
        source ([`ActivationAnchor`]): Has the sensitivities.
        sites (`Mapping[str, list[LinearSite]]`): The linears with a subspace, by name.
        subspaces (`Iterable[InputSubspace]`): The subspaces.
        ranks (`Mapping[str, int]`): How many leading input directions of each linear the pairs are taken from.
        share (`float`): Above 0 and at most 1, which holds all pairs that matter at all.

    Returns:
        `dict[str, HeldPairs]`: Of each linear that trains, even if none of its pairs is held.

    Raises:
        ValueError: If there are no sensitivities, or not one that fits each of the linears, all of them are zero, or a
            linear has adapters.
    """
    sensitivities: Mapping[str, PairSensitivity] = getattr(source, "sensitivities", None) or {}
    if not sensitivities:
        raise ValueError(
            "sensitivity needs an anchor with sensitivities: collect one with SubspaceOptions(sensitivity=True)"
        )
    chosen: dict[str, Tensor] = {}
    for name, stored in ((name, s.basis.shape[1]) for s in subspaces for name in s.linears):
        if any(site.has_adapters for site in sites[name]):
            raise ValueError(
                f"{name} has adapters, of which pairs of directions cannot be held: leave sensitivity out, which "
                "holds whole input directions, or merge the adapters first"
            )
        if not any(site.linear.weight.requires_grad for site in sites[name]):
            continue
        if name not in sensitivities:
            raise ValueError(f"the anchor has no sensitivities for the linear {name!r}, of which it has a subspace")
        found = sensitivities[name]
        shape = (found.output_basis.shape[0], *found.sensitivities.shape[1:])
        if shape != (expected := (sites[name][0].linear.out_features, stored)):
            raise ValueError(
                f"{name!r} has outputs of width {expected[0]} and a subspace of {expected[1]} input directions, but "
                f"its sensitivities are for {shape[0]} and {shape[1]}"
            )
        chosen[name] = found.sensitivities.detach().cpu()[:, : ranks[name]]
    pairs = sum(values.numel() for values in chosen.values())
    if pairs and not any(bool(values.any()) for values in chosen.values()):
        raise ValueError(
            f"sensitivity: all {pairs} pairs of the {len(chosen)} linears that train have a sensitivity of zero, "
            "expected some above it: the predictions of the anchor's batches do not depend on these linears"
        )
    masks = largest_pairs(chosen, share)
    return {name: HeldPairs(sensitivities[name], mask) for name, mask in masks.items()}


def largest_pairs(sensitivities: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """
    Where the largest sensitivities of several linears are, by one threshold for all of them, until they add up to a
    share of the sum.

    Args:
        sensitivities (`Mapping[str, Tensor]`): Of each linear, `(m, k)`, on the CPU; not negative.
        share (`float`): Above 0 and at most 1, which takes all that are above zero.

    Returns:
        `dict[str, Tensor]`: Booleans `(m, k)` for each linear.
    """
    threshold = sensitivity_threshold(sensitivities.values(), share)
    return {name: (values >= threshold) & (values > 0) for name, values in sensitivities.items()}


def sensitivity_threshold(values: Iterable[Tensor], share: float) -> float:
    """
    The largest of the values such that those not below it add up to a share of the sum of all.

    Args:
        values (`Iterable[Tensor]`): Of any shapes; not negative.
        share (`float`): Above 0 and at most 1.

    Returns:
        `float`: 0 for a share of 1, which takes all; and where there are no values.
    """
    every = [tensor.flatten() for tensor in values]
    if share == 1 or not sum(tensor.numel() for tensor in every):
        return 0.0
    falling = torch.cat(every).sort(descending=True).values
    reached = falling.double().cumsum(0)
    # What rounding takes from the sums must not ask for more than all.
    wanted = share * float(reached[-1])
    return float(falling[min(int((reached < wanted).sum()), falling.numel() - 1)])
