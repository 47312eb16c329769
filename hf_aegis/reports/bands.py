"""A figure's course over training steps in several runs: their mean, and how far they scatter."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hf_aegis.reports.run_files import Records


class Band(NamedTuple):
    """Over the steps that all runs have logged: the mean over runs, and the edges of the band around it, `(S,)`."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def series(records: Records, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the records that have `key`, the last one of each step; NaN for what was not finite."""
    pairs = {record["step"]: record[key] for record in records if key in record}
    return np.asarray(list(pairs)), np.asarray(list(pairs.values()), dtype=float)


def band(runs: Sequence[Records], key: str) -> Band:
    """
    Mean of `key` over runs with other seeds. The band around it reaches from the smallest to the largest of them: of a
    few runs that says more than a standard deviation, and it stays positive where the figure is.
    """
    found = [series(records, key) for records in runs]
    found = [(steps, values) for steps, values in found if len(steps)]
    if not found:
        return Band(*[np.empty(0)] * 4)
    common = set(found[0][0].tolist()).intersection(*(steps.tolist() for steps, _ in found[1:]))
    # In the order in which they were logged.
    steps = np.asarray([step for step in found[0][0].tolist() if step in common])
    values = np.stack([of_run[np.isin(its, steps)] for its, of_run in found])
    return Band(steps, values.mean(axis=0), values.min(axis=0), values.max(axis=0))


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred running mean over up to `window` values, fewer near the ends; NaN are passed over."""
    half = window // 2
    starts = (max(0, index - half) for index in range(len(values)))
    pieces = [values[start : index + half + 1] for index, start in enumerate(starts)]
    return np.asarray([np.nanmean(piece) if np.isfinite(piece).any() else np.nan for piece in pieces])
