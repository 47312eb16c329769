"""The orthonormal discrete cosine transform over time, and its inverse."""

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=32)
def cosine_matrix(length: int) -> np.ndarray:
    """
    Matrix `C` of the type-II discrete cosine transform, orthonormal: `C Cᵀ = I`.

    `C[k, n] = √(2/H) cos(π (2n + 1) k / 2H)`, with the first row divided by √2 (Ahmed, Natarajan, Rao 1974).

    Args:
        length (`int`): `H`, at least 1.

    Returns:
        `np.ndarray` of shape `(H, H)`, float64, read-only: rows are frequencies, columns time steps.

    Raises:
        ValueError: `length` is below 1.
    """
    if length < 1:
        raise ValueError(f"a cosine transform needs at least one time step, found {length}")
    steps = np.arange(length)
    matrix = np.sqrt(2 / length) * np.cos(np.pi * (2 * steps + 1) * steps[:, None] / (2 * length))
    matrix[0] /= np.sqrt(2)
    matrix.setflags(write=False)
    return matrix


def dct(values: np.ndarray) -> np.ndarray:
    """
    Cosine coefficients of every dimension's course over time.

    Args:
        values (`np.ndarray` of shape `(..., H, A)`): time steps before dimensions.

    Returns:
        `np.ndarray` of the same shape, float64: frequencies before dimensions. The transform is orthonormal: it keeps
        the Euclidean norm over the time axis.
    """
    return cosine_matrix(values.shape[-2]) @ values


def inverse_dct(coefficients: np.ndarray) -> np.ndarray:
    """Inverse of `dct`: values of shape `(..., H, A)`, float64."""
    return cosine_matrix(coefficients.shape[-2]).T @ coefficients
