"""How far a mean over samples can be trusted: the percentile bootstrap (Efron, 1979)."""

from collections.abc import Sequence

import numpy as np


# Draws held at a time: 32 MB of indices.
_CHUNK = 2**22


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """
    Percentile bootstrap interval of a mean: the quantiles of the means of resamples drawn with replacement.

    It takes the samples for independent. Several questions on one image are not, and their mean is then less certain
    than the interval says. Nor do the intervals of two models on the same questions test their difference: for that,
    give the differences of their values, question by question. Memory does not grow with `resamples`; 200,000 values
    take some seconds.

    Args:
        values (`Sequence[float]` or `np.ndarray` of shape `(N,)`): one finite value per sample.
        level (`float`, *optional*, defaults to `0.95`): share of the resamples' means between the bounds.
        resamples (`int`, *optional*, defaults to `2000`): number of resamples.
        seed (`int`, *optional*, defaults to `0`): of the draws.

    Returns:
        `tuple[float, float]`: lower and upper bound.

    Raises:
        ValueError: if `values` is empty, not one-dimensional or not finite, or another argument is out of range.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"values must be finite and of shape (N,), N at least 1; found shape {array.shape}.")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1; found {level}.")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1; found {resamples}.")
    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK // array.size)
    means = np.concatenate(
        [
            array[generator.integers(array.size, size=(min(rows, resamples - start), array.size))].mean(axis=1)
            for start in range(0, resamples, rows)
        ]
    )
    # Rounding must not put a bound of equal values beside them.
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2]).clip(array.min(), array.max())
    return float(low), float(high)
