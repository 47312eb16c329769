"""One anchor's statistics from those of partial collections."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_aegis.anchors.linear_layers.second_moments import leading_subspace
from hf_aegis.anchors.linear_layers.subspaces import InputSubspace, SubspaceOptions
from hf_aegis.anchors.statistics import AnchorStatistics
from hf_aegis.functional.moments import Moments, merge_moments
from hf_aegis.functional.subspace import merge_eigenpairs


if TYPE_CHECKING:
    from hf_aegis.anchors.anchor import ActivationAnchor


def merged_statistics(anchors: Sequence["ActivationAnchor"]) -> AnchorStatistics:
    """
    What [`ActivationAnchor.merge`] makes an anchor of.

    Raises:
        AnchorMismatchError: if they differ in model, data set or policy.
        ValueError: if there are none, or several with sensitivities.
    """
    if not anchors:
        raise ValueError("no anchors to merge")
    refuse_sensitivities(anchors)
    fingerprint = anchors[0].fingerprint
    for anchor in anchors[1:]:
        fingerprint = fingerprint.merged_with(anchor.fingerprint)
    options = fingerprint.subspace_options
    subspaces = None if options is None else merged_subspaces([anchor.subspaces for anchor in anchors], options)
    return AnchorStatistics(*merged_moments(anchors), fingerprint, subspaces, anchors[0].sensitivities)


def merged_moments(anchors: Sequence["ActivationAnchor"]) -> tuple[Tensor, Tensor]:
    """
    Mean and variance `(L, D)` of anchors of one moments policy, taken together: weighted by their batches
    (`"batch"`) or by their tokens (`"pooled"`).
    """
    if anchors[0].fingerprint.moments == "pooled":
        total = _pooled_moments(anchors[0])
        for anchor in anchors[1:]:
            total = merge_moments(total, _pooled_moments(anchor))
        return total.mean, total.variance
    weights = torch.tensor([anchor.fingerprint.num_batches for anchor in anchors], dtype=torch.float64)
    weights = (weights / weights.sum())[:, None, None]
    mean = (torch.stack([anchor.mean.cpu().double() for anchor in anchors]) * weights).sum(dim=0)
    variance = (torch.stack([anchor.variance.cpu().double() for anchor in anchors]) * weights).sum(dim=0)
    return mean, variance


def merged_subspaces(
    parts: Sequence[Mapping[str, InputSubspace]], options: SubspaceOptions
) -> dict[str, InputSubspace]:
    """
    Subspaces of disjoint data taken together, weighted by their numbers of inputs: of the union's second moments where
    nothing was truncated, else of what the parts have kept of them. Total energies are exact in either case.

    Args:
        parts (`Sequence[Mapping[str, InputSubspace]]`): At least one.
        options ([`SubspaceOptions`]): How many directions to keep.

    Raises:
        ValueError: if the parts are not for the same linear layers.
    """
    if len(parts) == 1:
        return dict(parts[0])
    for part in parts[1:]:
        _check_same_linears(parts[0], part)
    return {key: _merged([part[key] for part in parts], options) for key in parts[0]}


def refuse_sensitivities(anchors: Sequence["ActivationAnchor"]) -> None:
    """
    Refuses several anchors with sensitivities, for which there is no rule.

    Raises:
        ValueError: if there are two or more, and they have sensitivities.
    """
    if len(anchors) > 1 and any(anchor.sensitivities for anchor in anchors):
        raise ValueError(
            "anchors with sensitivities do not merge: each part has them for directions of its own, and squares of "
            "products in one basis do not tell those in another. Collect them from all batches at once, or merge "
            "anchors without them"
        )


def _merged(subspaces: Sequence[InputSubspace], options: SubspaceOptions) -> InputSubspace:
    count = sum(subspace.num_inputs for subspace in subspaces)
    weights = [subspace.num_inputs / count for subspace in subspaces]
    energies, basis = merge_eigenpairs(
        [
            (subspace.energies.cpu(), subspace.basis.cpu(), weight)
            for subspace, weight in zip(subspaces, weights, strict=True)
        ]
    )
    total = sum(weight * subspace.total_energy for subspace, weight in zip(subspaces, weights, strict=True))
    return leading_subspace(subspaces[0].linears, energies, basis, total, count, options)


def _check_same_linears(first: Mapping[str, InputSubspace], second: Mapping[str, InputSubspace]) -> None:
    groups = [{key: subspace.linears for key, subspace in part.items()} for part in (first, second)]
    for key in sorted(set(groups[0]) | set(groups[1])):
        if groups[0].get(key) != groups[1].get(key):
            raise ValueError(
                f"subspaces of different linear layers do not merge: {key} is for {groups[0].get(key)} in the first "
                f"and for {groups[1].get(key)} in the second"
            )


def _pooled_moments(anchor: "ActivationAnchor") -> Moments:
    count = torch.tensor(float(anchor.fingerprint.num_tokens), dtype=torch.float64)
    return Moments(count, anchor.mean.cpu().double(), anchor.variance.cpu().double() * count)
