import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies

from hf_aegis.functional.spectra import concentration_ratio


MATRICES = numpy_strategies.arrays(
    "float64",
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    elements=st.floats(-10, 10).map(lambda value: round(value, 3)),
)


def test_hand_computed_ratios():
    values = torch.tensor([[4.0, 2.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    assert concentration_ratio(values, 1).tolist() == pytest.approx([16 / 24, 0.25])
    assert concentration_ratio(values, 3).tolist() == pytest.approx([1.0, 0.75])
    assert concentration_ratio(values[0], 2).item() == pytest.approx(20 / 24)


@settings(deadline=None)
@given(MATRICES)
def test_it_is_the_energy_of_the_best_approximation_of_that_rank(matrix):
    matrix = torch.from_numpy(matrix)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    for k in range(1, len(values) + 1):
        ratio = concentration_ratio(values, k).item()
        if matrix.count_nonzero() == 0:
            assert math.isnan(ratio)
            continue
        approximation = left[:, :k] * values[:k] @ right[:k]
        assert ratio == pytest.approx((approximation.norm() / matrix.norm()).square().item(), abs=1e-12)


def test_tiny_gradients_have_the_ratio_of_large_ones():
    values = torch.tensor([3.0, 2.0, 1.0])
    assert concentration_ratio(values * 1e-30, 1).item() == pytest.approx(9 / 14)
    assert concentration_ratio(values * 1e30, 1).item() == pytest.approx(9 / 14)


@pytest.mark.parametrize("k", [0, -1, 4])
def test_a_count_outside_the_spectrum_is_refused(k):
    with pytest.raises(ValueError, match=f"between 1 and the 3 singular values, found {k}"):
        concentration_ratio(torch.ones(3), k)
