"""Second moments of a linear layer's inputs or output gradients, in full or as a sketch, summed batch by batch."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hf_aegis.anchors.linear_layers.subspaces import STORAGE_DTYPES, InputSubspace, SubspaceOptions
from hf_aegis.anchors.shares import Share
from hf_aegis.functional.product_precision import full_precision_products
from hf_aegis.functional.subspace import eigenpairs, nystrom_eigenpairs, rank_for_energy


class SketchMatrices:
    """
    The random matrices Ω that inputs are sketched with: one of orthonormal columns per width and device, the same ones
    for the same seed, whatever the device. Inputs of one width share theirs, as it need not be independent between
    them.

    Args:
        options ([`SubspaceOptions`]): Width of the sketches, and seed.
    """

    def __init__(self, options: SubspaceOptions):
        self.options = options
        self._matrices: dict[tuple[int, torch.device], Tensor] = {}

    def columns(self, width: int) -> int:
        """How many columns the sums over inputs of a width have: as many, or those of a sketch."""
        columns = self.options.max_rank + self.options.oversampling
        return width if width <= max(self.options.exact_width, columns) else columns

    def matrix(self, width: int, device: torch.device) -> Tensor | None:
        """Ω `(width, l)` in float32, or `None` for inputs whose second moments are summed in full."""
        columns = self.columns(width)
        if columns == width:
            return None
        if (width, device) not in self._matrices:
            generator = torch.Generator().manual_seed(self.options.seed)
            drawn = torch.randn(width, columns, generator=generator, dtype=torch.float64)
            self._matrices[width, device] = torch.linalg.qr(drawn)[0].float().to(device)
        return self._matrices[width, device]


class SecondMoments:
    """
    Sums over vectors x (a linear layer's inputs, or the gradients at its outputs) of x xᵀ, or of its product with a
    test matrix and of ‖x‖². All of them are linear in the data, so batches add up in any order. Products over a batch
    are in float32, or float64 for float64 vectors; sums over batches in float64, on the vectors' device.

    Args:
        width (`int`): Of the vectors.
        device (`torch.device`): Where the sums are.
        test_matrix (`Tensor` of shape `(width, l)`, *optional*): Ω, for a sketch.
    """

    def __init__(self, width: int, device: torch.device, test_matrix: Tensor | None = None):
        # Apple's GPUs have no float64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        columns = width if test_matrix is None else test_matrix.shape[1]
        self.test_matrix = test_matrix
        self.products = torch.zeros(width, columns, dtype=dtype, device=device)
        self.energy = torch.zeros((), dtype=dtype, device=device)
        self.count = torch.zeros((), dtype=dtype, device=device)

    def add(self, vectors: Tensor, mask: Tensor | None) -> None:
        """
        Adds a batch. Nothing here waits for the device.

        Args:
            vectors (`Tensor` of shape `(..., width)`): The batch.
            mask (`Tensor` of shape `(...)`, *optional*): Non-zero where a vector counts, NaN or not elsewhere.
        """
        values = masked_values(vectors, mask).flatten(end_dim=-2)
        self.count += len(values) if mask is None else (mask != 0).sum().to(self.count.device)
        # The forward pass around this is in the precision that the caller chose; the sums are not.
        with full_precision_products(values.device):
            if self.test_matrix is None:
                self.products += values.mT @ values
            else:
                self.products += values.mT @ (values @ self.test_matrix.to(values.dtype))
                self.energy += torch.linalg.vector_norm(values).to(self.energy.dtype).square()

    def merge_over(self, share: Share) -> None:
        """Adds what other processes have summed up, in each of them."""
        for total in (self.products, self.energy, self.count):
            share.sum_(total)

    def eigenpairs(self, what: str) -> tuple[Tensor, Tensor, float, int]:
        """
        Leading directions of what was added.

        Args:
            what (`str`): Of what the vectors are, in the plural, for errors.

        Returns:
            `tuple`: energies `(l,)`, largest first, orthonormal basis `(width, l)`, total energy E‖x‖² and number of
            vectors.

        Raises:
            ValueError: if nothing was added, or sums are not finite.
        """
        count = int(self.count)
        total = float(self.products.trace() if self.test_matrix is None else self.energy)
        if count == 0:
            raise ValueError(f"none of the {what} counts: the mask leaves none")
        if not math.isfinite(total) or not bool(torch.isfinite(self.products).all()):
            raise ValueError(f"the {what} hold values that are not finite")
        if self.test_matrix is None:
            energies, basis = eigenpairs(self.products)
        else:
            test_matrix = self.test_matrix.to(self.products.dtype)
            # The products over a batch were in float32, and a sketch can be no better.
            precision = torch.finfo(torch.float32).eps
            energies, basis = nystrom_eigenpairs(self.products, test_matrix, precision)
        return energies / count, basis, total / count, count

    def subspace(self, linears: tuple[str, ...], options: SubspaceOptions) -> InputSubspace:
        """
        The leading directions of inputs that were added, on the CPU.

        Raises:
            ValueError: if nothing was, or sums are not finite; the linear layer is named.
        """
        energies, basis, total, count = self.eigenpairs(f"inputs of {linears[0]}")
        return leading_subspace(linears, energies, basis, total, count, options)


_SUMS = ("products", "energy", "count")


def pack_sums(moments: Mapping[str, SecondMoments]) -> dict[str, Tensor]:
    """Sums as tensors called `<key>.products`, `<key>.energy` and `<key>.count`."""
    return {f"{key}.{name}": getattr(sums, name) for key, sums in moments.items() for name in _SUMS}


def unpack_sums(
    tensors: Mapping[str, Tensor], devices: Mapping[str, torch.device], test_matrices: SketchMatrices
) -> dict[str, SecondMoments]:
    """
    The inverse of [`pack_sums`].

    Args:
        tensors (`Mapping[str, Tensor]`): What it gave, and maybe others.
        devices (`Mapping[str, torch.device]`): Where the sums are to be, by key; keys without sums do not matter.
        test_matrices ([`SketchMatrices`]): As for the sums at first.

    Raises:
        ValueError: if tensors are missing, or have another shape or dtype than sums have.
    """
    found = {}
    for key, device in devices.items():
        if (products := tensors.get(f"{key}.products")) is not None:
            width = products.shape[0] if products.dim() == 2 else 0
            shapes = {"products": (width, test_matrices.columns(width)), "energy": (), "count": ()}
            # Before anything is made of the width that the file says.
            for name, shape in shapes.items():
                part = tensors.get(f"{key}.{name}")
                if width == 0 or part is None or tuple(part.shape) != shape or not part.is_floating_point():
                    shown = None if part is None else (part.dtype, tuple(part.shape))
                    raise ValueError(f"{key}.{name} must be floating point of shape {shape}, found {shown}")
            found[key] = SecondMoments(width, device, test_matrices.matrix(width, device))
            for name in shapes:
                getattr(found[key], name).copy_(tensors[f"{key}.{name}"])
    return found


def masked_values(vectors: Tensor, mask: Tensor | None) -> Tensor:
    """
    Vectors in float32, or float64 where they were, with zeros in the place of those that do not count.

    Args:
        vectors (`Tensor` of shape `(..., width)`): Any.
        mask (`Tensor` of shape `(...)`, *optional*): Non-zero where a vector counts, NaN or not elsewhere.
    """
    values = vectors if vectors.dtype == torch.float64 else vectors.float()
    return values if mask is None else values.masked_fill((mask == 0).to(values.device).unsqueeze(-1), 0.0)


def leading_subspace(
    linears: tuple[str, ...],
    energies: Tensor,
    basis: Tensor,
    total_energy: float,
    num_inputs: int,
    options: SubspaceOptions,
) -> InputSubspace:
    """As many leading directions as the options ask for, on the CPU, in the dtype that they ask for."""
    kept = leading_basis(energies, basis, total_energy, options)
    return InputSubspace(
        linears=linears,
        basis=kept,
        energies=energies[: kept.shape[1]].float().cpu(),
        total_energy=total_energy,
        num_inputs=num_inputs,
    )


def leading_basis(energies: Tensor, basis: Tensor, total_energy: float, options: SubspaceOptions) -> Tensor:
    """The basis of [`leading_subspace`]."""
    rank = rank_for_energy(energies, total_energy, options.energy, options.min_rank, options.max_rank)
    return basis[:, :rank].to(STORAGE_DTYPES[options.dtype]).cpu().contiguous()
