import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_aegis.functional.subspace import (
    eigenpairs,
    merge_eigenpairs,
    nystrom_eigenpairs,
    principal_angles,
    rank_for_energy,
)


def orthonormal(width, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, columns, generator=generator, dtype=torch.float64))[0]


def with_spectrum(energies, seed=0):
    basis = orthonormal(len(energies), len(energies), seed)
    return basis @ torch.diag(torch.as_tensor(energies, dtype=torch.float64)) @ basis.mT, basis


@pytest.mark.parametrize(
    ("energy", "bounds", "rank"),
    [
        (0.5, (1, 9), 1),
        (0.51, (1, 9), 2),
        (0.8, (1, 9), 2),
        (0.9, (1, 9), 3),
        (1.0, (1, 9), 4),
        (0.5, (3, 9), 3),
        (1.0, (1, 2), 2),
        (0.1, (7, 9), 4),
    ],
)
def test_rank_is_the_least_that_holds_the_share(energy, bounds, rank):
    assert rank_for_energy(torch.tensor([5.0, 3.0, 1.0, 1.0]), 10.0, energy, *bounds) == rank


def test_directions_that_hold_less_than_the_share_are_all_taken():
    assert rank_for_energy(torch.tensor([2.0, 1.0]), 10.0, 0.9, 1, 100) == 2


def test_directions_without_energy_are_not_taken_for_rounding():
    energies = torch.tensor([0.1] * 10 + [0.0] * 6, dtype=torch.float64)
    assert rank_for_energy(energies, float(energies[:10].sum()) * (1 + 2e-16), 1.0, 1, 16) == 10


@given(st.lists(st.floats(0, 1e3, width=32), min_size=1, max_size=12), st.floats(1e-3, 1))
@settings(max_examples=50, deadline=None)
def test_one_direction_fewer_holds_less(values, energy):
    energies = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    total = float(energies.sum())
    rank = rank_for_energy(energies, total, energy, 1, len(energies))
    assert float(energies[:rank].sum()) >= energy * total * (1 - 1e-12)
    assert rank == 1 or float(energies[: rank - 1].sum()) < energy * total


@pytest.mark.parametrize(
    ("energies", "energy", "bounds", "message"),
    [
        (torch.ones(0), 0.5, (1, 2), "at least one entry"),
        (torch.ones(2, 2), 0.5, (1, 2), "must be a vector"),
        (torch.ones(2), 0.0, (1, 2), "energy must be above 0"),
        (torch.ones(2), 1.1, (1, 2), "energy must be above 0 and at most 1, found 1.1"),
        (torch.ones(2), 0.5, (0, 2), "1 <= min_rank <= max_rank, found 0 and 2"),
        (torch.ones(2), 0.5, (3, 2), "found 3 and 2"),
    ],
)
def test_ranks_that_cannot_be_asked_for_are_refused(energies, energy, bounds, message):
    with pytest.raises(ValueError, match=message):
        rank_for_energy(energies, 2.0, energy, *bounds)


def test_eigenpairs_are_largest_first_and_rebuild_the_matrix():
    matrix, _ = with_spectrum([0.0, 4.0, 1.0, 9.0, 0.0])
    energies, basis = eigenpairs(matrix)
    np.testing.assert_allclose(energies, [9, 4, 1, 0, 0], atol=1e-14)
    assert (energies >= 0).all()
    torch.testing.assert_close(basis @ torch.diag(energies) @ basis.mT, matrix)


def test_a_sketch_of_a_matrix_of_low_rank_is_exact():
    matrix, _ = with_spectrum([7.0, 3.0, 0.5, 0.1] + [0.0] * 36)
    test_matrix = orthonormal(40, 8, seed=1)
    energies, basis = nystrom_eigenpairs(matrix @ test_matrix, test_matrix)
    exact, exact_basis = eigenpairs(matrix)
    torch.testing.assert_close(energies[:4], exact[:4], rtol=1e-10, atol=0)
    assert float(energies[4:].max()) < 1e-13
    assert float(principal_angles(basis[:, :4], exact_basis[:, :4]).max()) < 1e-7
    torch.testing.assert_close(basis.mT @ basis, torch.eye(8, dtype=torch.float64))


@pytest.mark.parametrize("decay", [0.6, 0.8])
def test_a_sketch_of_a_decaying_spectrum_errs_as_the_theory_allows(decay):
    width, columns, leading = 120, 40, 10
    matrix, _ = with_spectrum(decay ** np.arange(width), seed=2)
    test_matrix = orthonormal(width, columns, seed=3)
    energies, basis = nystrom_eigenpairs(matrix @ test_matrix, test_matrix)
    exact, exact_basis = eigenpairs(matrix)
    # Tropp et al. (2017), theorem 4.1: the expected error in trace norm. Twice that, for a single draw.
    tails = [(1 + rank / (columns - rank - 1)) * float(exact[rank:].sum()) for rank in range(columns - 1)]
    assert float(exact.sum() - energies.sum()) < 2 * min(tails)
    # Nyström's approximation lies below the matrix, and so do its eigenvalues.
    assert (energies <= exact[:columns] * (1 + 1e-9) + 1e-14).all()
    # Weyl for the eigenvalues, Davis and Kahan for the eigenvectors.
    error = torch.linalg.matrix_norm(matrix - basis @ torch.diag(energies) @ basis.mT, ord=2)
    assert ((exact[:columns] - energies).abs() <= error + 1e-14).all()
    angles = principal_angles(basis[:, :leading], exact_basis[:, :leading])
    assert angles[-1].sin() <= error / (exact[leading - 1] - energies[leading])


def test_a_sketch_in_float32_of_a_matrix_that_float32_cannot_resolve():
    matrix, _ = with_spectrum(10.0 ** -np.arange(0, 30, 0.5), seed=4)
    test_matrix = orthonormal(60, 40, seed=5)
    rounded = (matrix @ test_matrix).float().double()
    energies, basis = nystrom_eigenpairs(rounded, test_matrix, precision=torch.finfo(torch.float32).eps)
    exact, exact_basis = eigenpairs(matrix)
    torch.testing.assert_close(energies[:6], exact[:6], rtol=1e-2, atol=1e-6)
    assert float(principal_angles(basis[:, :4], exact_basis[:, :4]).max()) < 1e-3


def test_a_sketch_of_nothing():
    test_matrix = orthonormal(9, 3)
    energies, basis = nystrom_eigenpairs(torch.zeros_like(test_matrix), test_matrix)
    assert energies.tolist() == [0, 0, 0]
    torch.testing.assert_close(basis.mT @ basis, torch.eye(3, dtype=torch.float64))


def test_what_is_no_sketch_is_refused():
    test_matrix = orthonormal(9, 3)
    with pytest.raises(ValueError, match="not the sketch of a positive semi-definite matrix"):
        nystrom_eigenpairs(-2 * test_matrix, test_matrix)
    with pytest.raises(ValueError, match="not finite"):
        nystrom_eigenpairs(test_matrix * math.nan, test_matrix)
    with pytest.raises(ValueError, match=r"same shape, found \(9, 3\) and \(9, 2\)"):
        nystrom_eigenpairs(test_matrix, test_matrix[:, :2])


def test_merged_eigenpairs_are_those_of_the_weighted_sum():
    first, second = with_spectrum([5.0, 2.0, 1.0, 0.0, 0.0, 0.0], 1)[0], with_spectrum([3.0, 3.0, 0, 0, 0, 0.5], 2)[0]
    energies, basis = merge_eigenpairs([(*eigenpairs(first), 0.25), (*eigenpairs(second), 0.75)])
    torch.testing.assert_close(basis @ torch.diag(energies) @ basis.mT, 0.25 * first + 0.75 * second)
    torch.testing.assert_close(energies, torch.linalg.eigvalsh(0.25 * first + 0.75 * second).flip(0))


def test_eigenpairs_of_different_widths_do_not_merge():
    pairs = [(torch.ones(1), torch.eye(width)[:, :1], 1.0) for width in (3, 4)]
    with pytest.raises(ValueError, match=r"widths \[3, 4\]"):
        merge_eigenpairs(pairs)
    with pytest.raises(ValueError, match=r"widths \[\]"):
        merge_eigenpairs([])


@pytest.mark.parametrize("columns", [(3, 5), (5, 3), (1, 1)])
def test_principal_angles_are_scipys(columns):
    first, second = orthonormal(12, columns[0], 1), orthonormal(12, columns[1], 2)
    expected = np.sort(scipy.linalg.subspace_angles(first.numpy(), second.numpy()))
    np.testing.assert_allclose(principal_angles(first, second), expected, rtol=1e-10)


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-3, 0.7, 0.8, math.pi / 2 - 1e-9, math.pi / 2])
def test_small_and_large_angles_are_accurate(angle):
    basis = torch.eye(5, dtype=torch.float64)
    turned = (math.cos(angle) * basis[:, 1] + math.sin(angle) * basis[:, 3]).unsqueeze(1)
    torch.testing.assert_close(principal_angles(basis[:, :2], turned).item(), angle, rtol=1e-6, atol=1e-15)


def test_angles_between_bases_of_different_widths_are_refused():
    with pytest.raises(ValueError, match="found 3 and 4"):
        principal_angles(torch.eye(3), torch.eye(4))
