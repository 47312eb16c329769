"""The principal subspace of a linear layer's inputs, and how subspaces are collected."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_aegis.functional.subspace import rank_for_energy


STORAGE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Energies are rounded, and those of a sketch are estimates: their sum may exceed the total by this share.
_ENERGY_TOLERANCE = 1e-3

_NUMBERS: tuple[tuple[tuple[str, ...], Any, str], ...] = (
    (("energy", "temperature"), int | float, "a number"),
    (
        ("min_rank", "max_rank", "exact_width", "oversampling", "seed", "max_output_rank"),
        int,
        "an integer",
    ),
    (("sensitivity",), bool, "true or false"),
)
_SENSITIVITY_FIELDS = {"sensitivity", "temperature", "max_output_rank"}


@dataclass(frozen=True)
class SubspaceOptions:
    """
    What an anchor's subspaces are made of.

    Args:
        energy (`float`, *optional*, defaults to 0.999):
            Share of the inputs' energy E‖x‖² that the kept directions hold, above 0 and at most 1.
        min_rank, max_rank (`int`, *optional*, default to 1 and 512):
            Bounds on the number of directions, whatever the energy. A floor helps where a few massive activations
            hold nearly all of the energy.
        exact_width (`int`, *optional*, defaults to 4096):
            Inputs up to this width have their second moments summed in full, `width²` values in float64. Wider ones
            are sketched, in `width · (max_rank + oversampling)` values.
        oversampling (`int`, *optional*, defaults to 256):
            Columns of a sketch beyond `max_rank`; they make the last directions more accurate.
        seed (`int`, *optional*, defaults to 0):
            Of the sketches' test matrices.
        modules (`tuple[str, ...]`, *optional*):
            Linear layers outside the decoder layers to hold too, or modules whose linear layers to hold: the end of
            their path, such as `"multi_modal_projector"`.
        dtype (`str`, *optional*, defaults to `"float32"`):
            `"float32"` or `"bfloat16"`: of the bases, in memory and in the file.
        sensitivity (`bool`, *optional*, defaults to `False`):
            Collects a [`PairSensitivity`] for each linear layer as well. It covers the kept directions only, so keep
            many: a direction of little energy may matter for the answers.
        temperature (`float`, *optional*, defaults to 4.0):
            Of the predictions whose change the sensitivities are about. At one they vanish where a model is certain
            of its answers.
        max_output_rank (`int`, *optional*, defaults to 512):
            Most output directions that sensitivities are kept for. Outputs wider than `exact_width` have their
            gradients sketched.

    Raises:
        ValueError: if a value is out of range; it is named.
    """

    energy: float = 0.999
    min_rank: int = 1
    max_rank: int = 512
    exact_width: int = 4096
    oversampling: int = 256
    seed: int = 0
    modules: tuple[str, ...] = ()
    dtype: str = "float32"
    sensitivity: bool = False
    temperature: float = 4.0
    max_output_rank: int = 512

    def __post_init__(self) -> None:
        if isinstance(self.modules, str):
            raise ValueError(f"modules must be a sequence of names, found the string {self.modules!r}")
        if not isinstance(self.modules, Sequence) or not all(isinstance(name, str) for name in self.modules):
            raise ValueError(f"modules must be a sequence of names, found {self.modules!r}")
        # JSON has lists only.
        object.__setattr__(self, "modules", tuple(self.modules))
        for names, kinds, what in _NUMBERS:
            for name in names:
                value = getattr(self, name)
                if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
                    raise ValueError(f"{name} must be {what}, found {value!r}")
        if not 0 < self.energy <= 1:
            raise ValueError(f"energy must be above 0 and at most 1, found {self.energy}")
        lowests = {"min_rank": 1, "max_rank": 1, "max_output_rank": 1, "exact_width": 0, "oversampling": 0}
        for name, lowest in lowests.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} must be at least {lowest}, found {getattr(self, name)}")
        if self.min_rank > self.max_rank:
            raise ValueError(f"min_rank must not exceed max_rank, found {self.min_rank} and {self.max_rank}")
        if not isinstance(self.dtype, str) or self.dtype not in STORAGE_DTYPES:
            raise ValueError(f"dtype must be one of {tuple(STORAGE_DTYPES)}, found {self.dtype!r}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be above 0 and finite, found {self.temperature}")

    @property
    def format_version(self) -> int:
        """Version of the file format that an anchor with these options has."""
        return 3 if self.sensitivity else 2

    def to_dict(self) -> dict[str, Any]:
        """The fields; those of sensitivities only where they are collected, as older packages do not know them."""
        fields = dataclasses.asdict(self)
        return fields if self.sensitivity else {k: v for k, v in fields.items() if k not in _SENSITIVITY_FIELDS}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SubspaceOptions":
        """
        The inverse of [`~SubspaceOptions.to_dict`].

        Raises:
            ValueError: if fields are missing, unknown or out of range; they are named.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        needed = known if values.get("sensitivity") else known - _SENSITIVITY_FIELDS
        missing, unknown = sorted(needed - set(values)), sorted(set(values) - known)
        if missing or unknown:
            raise ValueError(f"subspace options: missing keys {missing}, unknown keys {unknown}")
        return cls(**values)


@dataclass(frozen=True, eq=False)
class InputSubspace:
    """
    Principal directions of an input that one or several linear layers read: the leading eigenvectors of its second
    moments E[x xᵀ], which are not centred, over the tokens that count.

    Args:
        linears (`tuple[str, ...]`):
            The layers that read this input, e.g. query, key and value projections. Those inside the decoder layers
            are called `layers.<index>.<path in the layer>`, others by their path in the unwrapped model without PEFT.
        basis (`Tensor` of shape `(in, k)`):
            Orthonormal columns, by falling energy. In bfloat16 they are so to its rounding only: whoever needs them
            orthonormal has to orthonormalise them again.
        energies (`Tensor` of shape `(k,)`):
            Eigenvalues: the mean of (uᵀx)² for each column u.
        total_energy (`float`):
            The trace, E‖x‖².
        num_inputs (`int`, *optional*, defaults to 1):
            Number of inputs x behind the means, which subspaces of disjoint data merge by.

    Raises:
        ValueError: if shapes do not belong together, or energies are not finite, negative, rising or above the total.
    """

    linears: tuple[str, ...]
    basis: Tensor
    energies: Tensor
    total_energy: float
    num_inputs: int = 1

    def __post_init__(self) -> None:
        if not self.linears:
            raise ValueError("a subspace needs the name of at least one linear layer")
        where = f"subspace of {self.linears[0]}"
        if self.basis.dim() != 2 or self.energies.shape != self.basis.shape[1:]:
            raise ValueError(
                f"{where}: basis and energies must have the shapes (in, k) and (k,), found "
                f"{tuple(self.basis.shape)} and {tuple(self.energies.shape)}"
            )
        if not 1 <= self.rank <= self.width:
            raise ValueError(f"{where}: rank must lie between 1 and the width {self.width}, found {self.rank}")
        if not bool(torch.isfinite(self.basis).all()) or not bool(torch.isfinite(self.energies).all()):
            raise ValueError(f"{where}: the basis or the energies hold values that are not finite")
        if bool((self.energies < 0).any()) or bool((self.energies.diff() > 0).any()):
            raise ValueError(f"{where}: energies must not be negative and must not rise")
        held = (
            float(self.energies.double().sum()) if self.energies.device.type != "mps" else float(self.energies.sum())
        )
        if not held <= self.total_energy * (1 + _ENERGY_TOLERANCE) < float("inf"):
            raise ValueError(f"{where}: the energies add up to {held}, above the total energy {self.total_energy}")
        if self.num_inputs < 1:
            raise ValueError(f"{where}: num_inputs must be at least 1, found {self.num_inputs}")

    @property
    def rank(self) -> int:
        """Number of directions k."""
        return self.basis.shape[1]

    @property
    def width(self) -> int:
        """Width of the input."""
        return self.basis.shape[0]

    @property
    def energy_share(self) -> float:
        """Share of the total energy that the directions hold; one where there is no energy at all."""
        return min(1.0, float(self.energies.sum()) / self.total_energy) if self.total_energy > 0 else 1.0

    def truncated(self, *, energy: float = 1.0, min_rank: int = 1, max_rank: int | None = None) -> "InputSubspace":
        """
        The leading directions alone.

        Args:
            energy (`float`, *optional*, defaults to 1.0):
                Share of the total energy to hold, above 0 and at most 1; as many directions as there are where they
                hold less.
            min_rank, max_rank (`int`, *optional*):
                Bounds on their number, whatever the energy; from 1 to all by default.

        Raises:
            ValueError: if an argument is out of range.
        """
        highest = max(self.rank, min_rank) if max_rank is None else max_rank
        rank = rank_for_energy(self.energies, self.total_energy, energy, min_rank, highest)
        return dataclasses.replace(self, basis=self.basis[:, :rank], energies=self.energies[:rank])

    def to(self, device: str | torch.device) -> "InputSubspace":
        """A copy of this subspace with its tensors on `device`."""
        moved = copy.copy(self)  # what was checked once is not checked again, which would wait for the device
        object.__setattr__(moved, "basis", self.basis.to(device))
        object.__setattr__(moved, "energies", self.energies.to(device))
        return moved

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, InputSubspace):
            return NotImplemented
        return (
            (self.linears, self.total_energy, self.num_inputs) == (other.linears, other.total_energy, other.num_inputs)
            and self.basis.dtype == other.basis.dtype
            and torch.equal(self.basis.cpu(), other.basis.cpu())
            and torch.equal(self.energies.cpu(), other.energies.cpu())
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return (
            f"InputSubspace(linears={self.linears!r}, width={self.width}, rank={self.rank}, "
            f"energy_share={self.energy_share:.6f})"
        )


def check_groups(subspaces: Mapping[str, InputSubspace], options: SubspaceOptions | None) -> None:
    """
    Refuses subspaces that an anchor cannot have.

    Raises:
        ValueError: if there are some without options or none with them, one does not have its first linear layer for
            a key, or a linear layer has two.
    """
    if bool(subspaces) != (options is not None):
        raise ValueError(
            f"an anchor has subspaces and their options or neither, found {len(subspaces)} subspaces and {options}"
        )
    owners: dict[str, str] = {}
    for key, subspace in subspaces.items():
        if key != subspace.linears[0]:
            raise ValueError(f"the subspace of {subspace.linears[0]} has the key {key!r}, expected its first linear")
        for name in subspace.linears:
            if owners.setdefault(name, key) != key:
                raise ValueError(f"linear layer {name} has two subspaces, {owners[name]!r} and {key!r}")
