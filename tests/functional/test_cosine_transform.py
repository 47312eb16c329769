import numpy as np
import pytest
from scipy import fft

from hf_aegis.functional.cosine_transform import cosine_matrix, dct, inverse_dct


@pytest.mark.parametrize("length", [1, 2, 5, 16, 50, 127])
def test_equals_scipy(length):
    values = np.random.default_rng(length).normal(size=(3, length, 4))
    found = dct(values)
    np.testing.assert_allclose(found, fft.dct(values, type=2, axis=1, norm="ortho"), atol=1e-12)
    np.testing.assert_allclose(inverse_dct(found), values, atol=1e-12)
    np.testing.assert_allclose(inverse_dct(values), fft.idct(values, type=2, axis=1, norm="ortho"), atol=1e-12)


def test_is_orthonormal_and_concentrates_a_constant():
    matrix = cosine_matrix(50)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(50), atol=1e-13)
    # 0.3 at each of 50 steps has the norm 0.3 √50, all of it in the first coefficient.
    np.testing.assert_allclose(dct(np.full((50, 1), 0.3))[:, 0], [0.3 * 50**0.5] + [0.0] * 49, atol=1e-13)


def test_the_shared_matrix_cannot_be_changed_and_needs_a_time_step():
    with pytest.raises(ValueError, match="read-only"):
        cosine_matrix(4)[0, 0] = 1
    with pytest.raises(ValueError, match="at least one time step, found 0"):
        dct(np.zeros((0, 3)))
