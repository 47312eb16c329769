"""Principal subspaces of second moments: their rank, their angles, and how they come from sketches and merge."""

from collections.abc import Sequence

import torch
from torch import Tensor


def rank_for_energy(energies: Tensor, total: float, energy: float, min_rank: int, max_rank: int) -> int:
    """
    The fewest leading directions that hold a share of the energy: the least k with `Σ_{j ≤ k} e_j ≥ energy · total`.

    Args:
        energies (`Tensor` of shape `(k,)`): Energies of the directions, not negative, largest first.
        total (`float`): The total energy; at least the sum of `energies`, but for rounding.
        energy (`float`): The share to hold, above 0 and at most 1.
        min_rank, max_rank (`int`): Bounds on the result, whatever the energy.

    Returns:
        `int`: between `min_rank` and `max_rank`, but never more than there are directions. All of them where they hold
        less than the share.

    Raises:
        ValueError: If `energies` is not a vector with entries, or an argument is out of range.
    """
    if energies.dim() != 1 or energies.numel() == 0:
        raise ValueError(f"energies must be a vector with at least one entry, found shape {tuple(energies.shape)}")
    if not 0 < energy <= 1:
        raise ValueError(f"energy must be above 0 and at most 1, found {energy}")
    if not 1 <= min_rank <= max_rank:
        raise ValueError(f"ranks need 1 <= min_rank <= max_rank, found {min_rank} and {max_rank}")
    held = energies.detach().cpu().double().cumsum(dim=0)
    # What rounding takes from the sum must not ask for directions without energy.
    wanted = energy * total * (1 - len(held) * torch.finfo(torch.float64).eps)
    needed = int((held < wanted).sum()) + 1
    return min(max(needed, min_rank), max_rank, len(held))


def eigenpairs(second_moments: Tensor) -> tuple[Tensor, Tensor]:
    """
    Eigenvalues and eigenvectors of a positive semi-definite matrix, largest first.

    Args:
        second_moments (`Tensor` of shape `(D, D)`): Symmetric but for rounding.

    Returns:
        `tuple[Tensor, Tensor]`: energies `(D,)`, where rounding leaves none below zero, and the orthonormal basis
        `(D, D)` of their directions, in columns.
    """
    energies, basis = torch.linalg.eigh((second_moments + second_moments.mT) / 2)
    return energies.flip(0).clamp(min=0), basis.flip(1)


def nystrom_eigenpairs(sketch: Tensor, test_matrix: Tensor, precision: float | None = None) -> tuple[Tensor, Tensor]:
    r"""
    Leading eigenpairs of a positive semi-definite matrix A, of which only a sketch is known: Nyström's approximation
    \\(A \approx Y (\Omega^T Y)^{-1} Y^T\\) with \\(Y = A \Omega\\), in the stable form of Tropp, Yurtsever, Udell &
    Cevher (2017), arXiv 1706.05736, algorithm 3: A is shifted by a rounding error's worth of identity,
    \\(\Omega^T Y\\) is factored by Cholesky, its quotient by SVD, and the shift is taken off the result.

    The approximation never exceeds A: energies are at most the true ones. It is exact, to rounding, for matrices whose
    rank does not exceed the sketch's columns.

    Args:
        sketch (`Tensor` of shape `(D, l)`): \\(Y\\), in float64 for accuracy.
        test_matrix (`Tensor` of shape `(D, l)`): \\(\Omega\\), with orthonormal columns and at random.
        precision (`float`, *optional*): Relative error that the sketch was computed with; by default that of its
            dtype.

    Returns:
        `tuple[Tensor, Tensor]`: energies `(l,)`, largest first, and the orthonormal basis `(D, l)`.

    Raises:
        ValueError: If the shapes differ, or this cannot be the sketch of a positive semi-definite matrix.
    """
    if sketch.dim() != 2 or sketch.shape != test_matrix.shape:
        raise ValueError(
            "sketch and test matrix must be matrices of the same shape, found "
            f"{tuple(sketch.shape)} and {tuple(test_matrix.shape)}"
        )
    scale = float(torch.linalg.matrix_norm(sketch))
    if scale == 0:
        return sketch.new_zeros(sketch.shape[1]), torch.linalg.qr(test_matrix)[0]
    shift = scale * (torch.finfo(sketch.dtype).eps if precision is None else precision)
    while shift < scale:
        shifted = sketch + shift * test_matrix
        core = test_matrix.mT @ shifted
        factor, failed = torch.linalg.cholesky_ex((core + core.mT) / 2)
        if not int(failed):
            quotient = torch.linalg.solve_triangular(factor, shifted.mT, upper=False).mT
            basis, singular_values, _ = torch.linalg.svd(quotient, full_matrices=False)
            return (singular_values.square() - shift).clamp(min=0), basis
        shift *= 10
    raise ValueError(
        "this is not the sketch of a positive semi-definite matrix, or it holds values that are not finite"
    )


def merge_eigenpairs(parts: Sequence[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor]:
    r"""
    Eigenpairs of a weighted sum of positive semi-definite matrices that are given by theirs,
    \\(\sum_i w_i U_i \mathrm{diag}(e_i) U_i^T\\): the left singular vectors of the scaled bases
    \\([\sqrt{w_1 e_1} U_1, \sqrt{w_2 e_2} U_2, \dots]\\) side by side.

    Args:
        parts (`Sequence[tuple[Tensor, Tensor, float]]`): Energies `(k_i,)`, basis `(D, k_i)` and weight of each.

    Returns:
        `tuple[Tensor, Tensor]`: energies and orthonormal basis, largest first, in float64; as many as all parts have
        directions, at most D.

    Raises:
        ValueError: If there are no parts, or their widths differ.
    """
    widths = sorted({basis.shape[0] for _, basis, _ in parts})
    if len(widths) != 1:
        raise ValueError(f"eigenpairs of one width are needed to merge, found widths {widths}")
    scaled = [basis.double() * (energies.double() * weight).sqrt() for energies, basis, weight in parts]
    basis, singular_values, _ = torch.linalg.svd(torch.cat(scaled, dim=1), full_matrices=False)
    return singular_values.square(), basis


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """
    Principal angles between two subspaces, in radians, smallest first. Small angles come from their sines and large
    ones from their cosines, so that both are accurate (Björck & Golub, 1973).

    Args:
        first (`Tensor` of shape `(D, k)`), second (`Tensor` of shape `(D, m)`): Orthonormal bases.

    Returns:
        `Tensor` of shape `(min(k, m),)`: angles between 0 and π/2.

    Raises:
        ValueError: If the widths differ.
    """
    if first.shape[0] != second.shape[0]:
        raise ValueError(f"bases must have the same width, found {first.shape[0]} and {second.shape[0]}")
    wide, narrow = (first, second) if first.shape[1] >= second.shape[1] else (second, first)
    overlap = wide.mT @ narrow
    cosines = torch.linalg.svdvals(overlap).clamp(max=1)
    sines = torch.linalg.svdvals(narrow - wide @ overlap).flip(0).clamp(max=1)
    return torch.where(cosines.square() > 0.5, sines.asin(), cosines.acos())
