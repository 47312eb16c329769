"""Leading singular triplets: exact, and from a sketch."""

import pytest
import torch

from hf_aegis.functional.truncated_svd import truncated_svd


def matrix_with(values, rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(columns, len(values), generator=generator, dtype=torch.float64))[0]
    return left @ torch.diag(torch.as_tensor(values, dtype=torch.float64)) @ right.T


@pytest.mark.parametrize("method", ["exact", "randomized"])
@pytest.mark.parametrize("shape", [(40, 30), (30, 40)])
def test_the_triplets_are_those_of_the_matrix(method, shape):
    values = [2.0**-index for index in range(12)]
    matrix = matrix_with(values, *shape)
    left, found, right = truncated_svd(matrix, 5, method=method)
    assert left.shape == (shape[0], 5) and right.shape == (5, shape[1])
    torch.testing.assert_close(found, torch.tensor(values[:5], dtype=torch.float64))
    torch.testing.assert_close(left.T @ left, torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(right @ right.T, torch.eye(5, dtype=torch.float64))
    # What is left of the matrix has the next singular value: no approximation of the rank is better.
    rest = matrix - left @ torch.diag(found) @ right
    torch.testing.assert_close(torch.linalg.matrix_norm(rest, 2), torch.tensor(values[5], dtype=torch.float64))


def test_the_sketch_is_near_the_exact_one_on_a_slowly_falling_spectrum():
    matrix = matrix_with([(1 + index) ** -0.5 for index in range(64)], 96, 64)
    _, exact, _ = truncated_svd(matrix, 16)
    left, values, right = truncated_svd(matrix, 16, method="randomized")
    assert ((exact - values) / exact).abs().max() < 2e-3
    error = (matrix - left @ torch.diag(values) @ right).norm()
    exact_error = torch.linalg.svdvals(matrix)[16:].norm()
    assert exact_error <= error < 1.002 * exact_error


def test_more_power_iterations_come_closer():
    matrix = torch.randn(80, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = torch.linalg.svdvals(matrix)[:8]
    errors = [
        (exact - truncated_svd(matrix, 8, method="randomized", oversampling=2, power_iterations=q)[1]).abs().max()
        for q in (0, 2, 8)
    ]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


def test_the_sketch_is_seeded_and_leaves_the_global_state_alone():
    matrix = torch.randn(20, 30, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    options = {"method": "randomized", "oversampling": 1, "power_iterations": 0}
    first, again = (truncated_svd(matrix, 4, seed=3, **options) for _ in range(2))
    other = truncated_svd(matrix, 4, seed=4, **options)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], other[1])
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_half_precision_is_decomposed_in_float32(method):
    matrix = torch.randn(20, 30, generator=torch.Generator().manual_seed(1)).bfloat16()
    for half, full in zip(
        truncated_svd(matrix, 20, method=method), truncated_svd(matrix.float(), 20, method=method), strict=True
    ):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, full, rtol=0, atol=0)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"method must be one of \('exact', 'randomized'\), found 'fast'"):
        truncated_svd(torch.ones(3, 4), 2, method="fast")
    with pytest.raises(ValueError, match="rank must lie between 1 and 3, found 4"):
        truncated_svd(torch.ones(3, 4), 4)
