"""Tables that say, without the tensors, what an anchor holds: a row for each decoder layer, and for each subspace."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hf_aegis.anchors.linear_layers.subspaces import InputSubspace


def layer_rows(mean: Tensor, variance: Tensor) -> list[dict[str, Any]]:
    """
    A row for each decoder layer.

    Args:
        mean, variance (`Tensor` of shape `(L, D)`):
            The anchor's moments.

    Returns:
        `list[dict]`: `layer`; `mean_rms`, the root mean square of the D means, and `mean_largest`, the largest of
        their absolute values; `std_mean`, `std_smallest` and `std_largest` of the D standard deviations.
    """
    mean, std = mean.double().cpu(), variance.double().cpu().sqrt()
    return [
        {
            "layer": index,
            "mean_rms": means.square().mean().sqrt().item(),
            "mean_largest": means.abs().max().item(),
            "std_mean": stds.mean().item(),
            "std_smallest": stds.min().item(),
            "std_largest": stds.max().item(),
        }
        for index, (means, stds) in enumerate(zip(mean, std, strict=True))
    ]


def subspace_rows(subspaces: Mapping[str, InputSubspace]) -> list[dict[str, Any]]:
    """
    A row for each subspace of linear layers' inputs, in the order of the layers' numbers.

    Returns:
        `list[dict]`: `linears`, which read this input; its `width`; `rank`, the number of directions; `energy_share`,
        what they hold of the input's energy; and `num_inputs`, the number of inputs seen.
    """
    return [
        {
            "linears": list(subspaces[name].linears),
            "width": subspaces[name].width,
            "rank": subspaces[name].rank,
            "energy_share": subspaces[name].energy_share,
            "num_inputs": subspaces[name].num_inputs,
        }
        for name in sorted(subspaces, key=by_number)
    ]


def by_number(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
