"""How much a model's predictions depend on pairs of directions of a linear layer's weight."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_aegis.anchors.linear_layers.subspaces import InputSubspace


@dataclass(frozen=True, eq=False)
class PairSensitivity:
    r"""
    Sensitivity of a model's predictions to a linear layer's weight W (out × in), pair by pair of an output direction v
    and a direction u of the layer's [`InputSubspace`]: the mean over samples of \\((v^T (\sum_t g_t x_t^T) u)^2\\),
    with inputs x and gradients g at the outputs of the sample's tokens t. This is the diagonal of the Gauss-Newton
    matrix in the Kronecker-factored eigenbasis (George et al. 2018, arXiv 1806.03884). A small change of W by
    \\(c\, v u^T\\) adds, to second order, \\(c^2 / (2 T^2)\\) times it to a sample's divergence, the sum over its
    predictions of KL at the temperature T that it was collected at.

    Args:
        linear (`str`):
            Name of the layer, as in [`InputSubspace`].
        output_basis (`Tensor` of shape `(out, m)`):
            Orthonormal columns v: leading eigenvectors of E[g gᵀ], by falling eigenvalue. In bfloat16 they are
            orthonormal to its rounding only.
        sensitivities (`Tensor` of shape `(m, k)`):
            Not negative; columns in the order of the input subspace's basis as the anchor has it.

    Raises:
        ValueError: if shapes do not belong together, or values are not finite or negative.
    """

    linear: str
    output_basis: Tensor
    sensitivities: Tensor

    def __post_init__(self) -> None:
        where = f"sensitivity of {self.linear}"
        shapes = tuple(self.output_basis.shape), tuple(self.sensitivities.shape)
        if [len(shape) for shape in shapes] != [2, 2] or shapes[0][1] != shapes[1][0]:
            raise ValueError(
                f"{where}: output basis and sensitivities must have the shapes (out, m) and (m, k), found "
                f"{shapes[0]} and {shapes[1]}"
            )
        if not 1 <= self.output_rank <= self.output_basis.shape[0] or shapes[1][1] < 1:
            raise ValueError(
                f"{where}: ranks must be at least 1, and that of outputs at most their width, found output basis "
                f"{shapes[0]} and sensitivities {shapes[1]}"
            )
        if not all(bool(torch.isfinite(tensor).all()) for tensor in (self.output_basis, self.sensitivities)):
            raise ValueError(f"{where}: the output basis or the sensitivities hold values that are not finite")
        if bool((self.sensitivities < 0).any()):
            raise ValueError(f"{where}: sensitivities must not be negative")

    @property
    def output_rank(self) -> int:
        """Number of output directions m."""
        return self.output_basis.shape[1]

    def to(self, device: str | torch.device) -> "PairSensitivity":
        """A copy with its tensors on `device`."""
        moved = copy.copy(self)  # what was checked once is not checked again, which would wait for the device
        object.__setattr__(moved, "output_basis", self.output_basis.to(device))
        object.__setattr__(moved, "sensitivities", self.sensitivities.to(device))
        return moved

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PairSensitivity):
            return NotImplemented
        return (
            self.linear == other.linear
            and self.output_basis.dtype == other.output_basis.dtype
            and torch.equal(self.output_basis.cpu(), other.output_basis.cpu())
            and torch.equal(self.sensitivities.cpu(), other.sensitivities.cpu())
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        output_rank, input_rank = self.sensitivities.shape
        return (
            f"PairSensitivity(linear={self.linear!r}, out={self.output_basis.shape[0]}, output_rank={output_rank}, "
            f"input_rank={input_rank})"
        )


def check_sensitivities(
    sensitivities: Mapping[str, PairSensitivity], subspaces: Mapping[str, InputSubspace], wanted: bool
) -> None:
    """
    Refuses sensitivities that an anchor cannot have.

    Args:
        sensitivities (`Mapping[str, PairSensitivity]`): The anchor's, by linear layer.
        subspaces (`Mapping[str, InputSubspace]`): The anchor's.
        wanted (`bool`): Whether the options say that there are sensitivities.

    Raises:
        ValueError: if there are some against the options, not one for each linear layer that has an input subspace,
            one has another layer's key, or not as many columns as the subspace has directions.
    """
    if not wanted and not sensitivities:
        return
    ranks = {name: subspace.rank for subspace in subspaces.values() for name in subspace.linears}
    if not wanted or set(sensitivities) != set(ranks):
        missing, unknown = sorted(set(ranks) - set(sensitivities)), sorted(set(sensitivities) - set(ranks))
        raise ValueError(
            f"an anchor has sensitivities for all linear layers of its subspaces, as its options say, or for none: "
            f"found sensitivity={wanted}, missing {missing if wanted else []}, "
            f"unknown {unknown if wanted else sorted(sensitivities)}"
        )
    for name, pairs in sensitivities.items():
        if pairs.linear != name:
            raise ValueError(f"the sensitivity of {pairs.linear} has the key {name!r}, expected its linear layer")
        if pairs.sensitivities.shape[1] != ranks[name]:
            raise ValueError(
                f"sensitivity of {name}: {pairs.sensitivities.shape[1]} columns, expected one for each of the "
                f"{ranks[name]} directions of its input subspace"
            )
