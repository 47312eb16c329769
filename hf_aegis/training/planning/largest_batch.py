"""The largest batch that fits, from the plans of two others."""

import math
from collections.abc import Mapping

import numpy as np


def telling_batches(batch: int, reference_share: float = 1.0) -> tuple[int, int]:
    """
    Two batches whose plans tell the largest one, that of the recipe among them if it is large enough. A single row is
    no matter of the same moments (where a dimension is one, a transposed copy is a view), nor is one of those that a
    `reference_share` takes.
    """
    least = max(batch, math.ceil(2 / reference_share))
    return least, 4 * least


def largest_batch(by_batch: Mapping[int, Mapping[str, np.ndarray]], available: float) -> int | None:
    """
    The largest batch of which every moment fits.

    A step goes through the same moments whatever its batch, and what is held at each of them is linear in the batch:
    some tensors have a row per sample, others none. Two plans therefore say how each moment grows. How the peak grows
    they do not: it passes from one moment to another, so that a line through two peaks promises too much beyond them.

    Args:
        by_batch (`Mapping[int, Mapping[str, numpy.ndarray]]`):
            Bytes held at each moment of each phase, `(moments,)`, in two batches; see [`telling_batches`].
        available (`float`): Bytes.

    Returns:
        `int`: 0 if not even one sample fits; `None` if all fits and nothing depends on the batch.

    Raises:
        ValueError: If there are not two batches, or they went through other moments.
    """
    if len(by_batch) != 2:
        raise ValueError(f"plans of two batches say how memory grows, found {sorted(by_batch)}")
    (smaller, first), (larger, second) = sorted(by_batch.items())
    most = math.inf
    for phase, less in first.items():
        more = second[phase]
        if less.shape != more.shape:
            raise ValueError(
                f"steps of {smaller} and of {larger} samples differ: {len(less)} and {len(more)} moments in the phase "
                f"{phase!r}"
            )
        slope = (more - less) / (larger - smaller)
        grows = slope > 0
        if (less[~grows] > available).any():
            return 0
        if grows.any():
            most = min(most, float((smaller + (available - less[grows]) / slope[grows]).min()))
    return None if most == math.inf else max(0, math.floor(most))
