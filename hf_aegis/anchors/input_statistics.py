"""Second moments of a linear layer's inputs, in full or as a sketch, summed batch by batch."""

import math

import torch
from torch import Tensor

from hf_aegis.anchors.subspaces import STORAGE_DTYPES, InputSubspace, SubspaceOptions
from hf_aegis.functional.subspace import eigenpairs, nystrom_eigenpairs, rank_for_energy


class TestMatrices:
    """
    The random matrices Ω that inputs are sketched with: one of orthonormal columns per width and device, the same ones
    for the same seed, whatever the device. Inputs of one width share theirs, as it need not be independent between
    them.

    Args:
        options ([`SubspaceOptions`]): Width of the sketches, and seed.
    """

    __test__ = False  # its name would make pytest collect it

    def __init__(self, options: SubspaceOptions):
        self.options = options
        self._matrices: dict[tuple[int, torch.device], Tensor] = {}

    def matrix(self, width: int, device: torch.device) -> Tensor | None:
        """Ω `(width, l)` in float32, or `None` for inputs whose second moments are summed in full."""
        columns = self.options.max_rank + self.options.oversampling
        if width <= max(self.options.exact_width, columns):
            return None
        if (width, device) not in self._matrices:
            generator = torch.Generator().manual_seed(self.options.seed)
            drawn = torch.randn(width, columns, generator=generator, dtype=torch.float64)
            self._matrices[width, device] = torch.linalg.qr(drawn)[0].float().to(device)
        return self._matrices[width, device]


class InputStatistics:
    """
    Sums over inputs x of x xᵀ, or of its product with a test matrix and of ‖x‖². All of them are linear in the data,
    so batches add up in any order. Products over a batch are in float32, or float64 for float64 inputs; sums over
    batches in float64, on the inputs' device.

    Args:
        width (`int`): Of the inputs.
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

    def add(self, inputs: Tensor, mask: Tensor | None) -> None:
        """
        Adds a batch. Nothing here waits for the device.

        Args:
            inputs (`Tensor` of shape `(..., width)`): What a linear layer is given.
            mask (`Tensor` of shape `(...)`, *optional*): Non-zero where an input counts, NaN or not elsewhere.
        """
        values = (inputs if inputs.dtype == torch.float64 else inputs.float()).flatten(end_dim=-2)
        if mask is None:
            self.count += len(values)
        else:
            keep = (mask != 0).to(values.device).flatten()
            values = values.masked_fill(~keep.unsqueeze(-1), 0.0)
            self.count += keep.sum()
        # Under the caller's autocast the products would be in half precision.
        with torch.autocast(values.device.type, enabled=False):
            if self.test_matrix is None:
                self.products += values.mT @ values
            else:
                self.products += values.mT @ (values @ self.test_matrix.to(values.dtype))
                self.energy += torch.linalg.vector_norm(values).to(self.energy.dtype).square()

    def subspace(self, linears: tuple[str, ...], options: SubspaceOptions) -> InputSubspace:
        """
        The leading directions of what was added, on the CPU.

        Raises:
            ValueError: if nothing was, or sums are not finite; the linear layer is named.
        """
        count = int(self.count)
        total = float(self.products.trace() if self.test_matrix is None else self.energy)
        if count == 0:
            raise ValueError(f"no input of {linears[0]} counts: the mask leaves none")
        if not math.isfinite(total) or not bool(torch.isfinite(self.products).all()):
            raise ValueError(f"the inputs of {linears[0]} hold values that are not finite")
        if self.test_matrix is None:
            energies, basis = eigenpairs(self.products)
        else:
            test_matrix = self.test_matrix.to(self.products.dtype)
            # The products over a batch were in float32, and a sketch can be no better.
            precision = torch.finfo(torch.float32).eps
            energies, basis = nystrom_eigenpairs(self.products, test_matrix, precision)
        return leading_subspace(linears, energies / count, basis, total / count, count, options)


def leading_subspace(
    linears: tuple[str, ...],
    energies: Tensor,
    basis: Tensor,
    total_energy: float,
    num_inputs: int,
    options: SubspaceOptions,
) -> InputSubspace:
    """As many leading directions as the options ask for, on the CPU, in the dtype that they ask for."""
    rank = rank_for_energy(energies, total_energy, options.energy, options.min_rank, options.max_rank)
    return InputSubspace(
        linears=linears,
        basis=basis[:, :rank].to(STORAGE_DTYPES[options.dtype]).cpu().contiguous(),
        energies=energies[:rank].float().cpu(),
        total_energy=total_energy,
        num_inputs=num_inputs,
    )
