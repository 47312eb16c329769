"""Quantile normalisation of robot states and actions, with the guard that near-constant dimensions need.

A dimension is mapped linearly so that its 1 % and 99 % quantiles land on -1 and 1 (the convention of openpi and of
arXiv 2501.09747). Quantiles ignore outliers, but a dimension that hardly moves, or moves in fewer than two steps out
of a hundred, has a quantile range near zero: dividing by it blows sensor noise up to thousands. Such a dimension is
mapped by its whole range instead, and never by less than `MINIMUM_HALF_RANGE`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import numpy as np
import torch


MINIMUM_HALF_RANGE = 0.01
"""Smallest half-range, in the feature's own unit, that is stretched to 1.

In LIBERO: a hundredth of the largest action (0.5 mm or 0.3°), 0.6° of a joint, 1 cm of a gripper finger's path of
4 cm. Below it lies noise rather than motion.
"""

Values = TypeVar("Values", np.ndarray, torch.Tensor)

_PER_DIMENSION = ("q01", "q99", "mean", "std", "min", "max")


@dataclass(frozen=True)
class FeatureStatistics:
    """
    Per-dimension statistics of one feature over every time step of a dataset.

    Args:
        name (`str`): what the feature is called in error messages, e.g. `"actions"`.
        q01, q99 (`Sequence[float]` of length `D`): 1 % and 99 % quantiles, linearly interpolated.
        mean, std (`Sequence[float]` of length `D`): mean and population standard deviation.
        min, max (`Sequence[float]` of length `D`): extremes.
        count (`int`): number of time steps.

    Raises:
        ValueError: a value has the wrong type or is not finite, lengths differ, or the order
            `min <= q01 <= q99 <= max` is broken.
    """

    name: str
    q01: Sequence[float]
    q99: Sequence[float]
    mean: Sequence[float]
    std: Sequence[float]
    min: Sequence[float]
    max: Sequence[float]
    count: int

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ValueError(f"statistics: 'name' must be a text, found {self.name!r}")
        for key in _PER_DIMENSION:
            values = getattr(self, key)
            if isinstance(values, str) or not isinstance(values, Sequence) or not all(map(_is_number, values)):
                raise ValueError(f"statistics of '{self.name}': '{key}' must be a list of numbers, found {values!r}")
            object.__setattr__(self, key, tuple(float(value) for value in values))
            for index, value in enumerate(getattr(self, key)):
                if not math.isfinite(value):
                    raise ValueError(f"statistics of '{self.name}': '{key}' of dimension {index} is {value}")
        if self.dimension == 0:
            raise ValueError(f"statistics of '{self.name}': no dimensions")
        for key in _PER_DIMENSION:
            if len(getattr(self, key)) != self.dimension:
                raise ValueError(
                    f"statistics of '{self.name}': '{key}' has {len(getattr(self, key))} dimensions, "
                    f"'q01' has {self.dimension}"
                )
        if type(self.count) is not int or self.count < 1:
            raise ValueError(
                f"statistics of '{self.name}': count must be an integer of at least 1, found {self.count!r}"
            )
        for index, (low, q01, q99, high) in enumerate(zip(self.min, self.q01, self.q99, self.max, strict=True)):
            if not low <= q01 <= q99 <= high:
                raise ValueError(
                    f"statistics of '{self.name}': dimension {index} breaks min <= q01 <= q99 <= max: "
                    f"{low}, {q01}, {q99}, {high}"
                )

    @property
    def dimension(self) -> int:
        """Number of dimensions `D`."""
        return len(self.q01)

    @classmethod
    def from_samples(cls, name: str, samples: np.ndarray) -> "FeatureStatistics":
        """
        Exact statistics of all samples, in float64.

        Args:
            name (`str`): the feature's name.
            samples (`np.ndarray` of shape `(N, D)`): every time step once.

        Raises:
            ValueError: `samples` is not a non-empty matrix, or holds NaN or infinity.
        """
        samples = np.asarray(samples, dtype=np.float64)
        if samples.ndim != 2 or 0 in samples.shape:
            raise ValueError(f"statistics of '{name}' need samples of shape (N, D), found {samples.shape}")
        _require_finite(samples, name)
        low, high = samples.min(axis=0), samples.max(axis=0)
        q01, q99 = np.clip(np.quantile(samples, [0.01, 0.99], axis=0), low, high)
        moments = {"q01": q01, "q99": q99, "mean": samples.mean(axis=0), "std": samples.std(axis=0)}
        return cls(
            name=name,
            count=len(samples),
            min=low.tolist(),
            max=high.tolist(),
            **{key: value.tolist() for key, value in moments.items()},
        )

    def to_dict(self) -> dict[str, Any]:
        """The statistics as JSON-ready values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "FeatureStatistics":
        """
        Inverse of `to_dict`.

        Raises:
            ValueError: a key is missing or unknown, or the values are refused by the constructor.
        """
        name = values.get("name", "?") if isinstance(values, Mapping) else "?"
        _require_keys(values, {field.name for field in fields(cls)}, f"statistics of '{name}'")
        return cls(**values)


@dataclass(frozen=True)
class DatasetStatistics:
    """
    What a policy must know of its training data to read states and to emit actions.

    Args:
        state (`FeatureStatistics`): proprioceptive state.
        actions (`FeatureStatistics`): actions, one entry per time step (not per chunk).
    """

    state: FeatureStatistics
    actions: FeatureStatistics

    def to_dict(self) -> dict[str, Any]:
        """The statistics as JSON-ready values."""
        return {"state": self.state.to_dict(), "actions": self.actions.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DatasetStatistics":
        """
        Inverse of `to_dict`.

        Raises:
            ValueError: a key is missing or unknown, or a feature's statistics are refused.
        """
        _require_keys(values, {"state", "actions"}, "dataset statistics")
        return cls(**{key: FeatureStatistics.from_dict(value) for key, value in values.items()})


def normalize(values: Values, statistics: FeatureStatistics, clip: bool = True) -> Values:
    """
    Maps each dimension so that its 1 % and 99 % quantiles become -1 and 1.

    `y = (x - c) / h` with centre `c = (q99 + q01) / 2` and half-range `h = (q99 - q01) / 2`. Where that `h` is below
    `MINIMUM_HALF_RANGE`, the dimension's extremes take the quantiles' place, and `h` is at least the minimum.

    Args:
        values (`np.ndarray` or `torch.Tensor` of shape `(..., D)`): floating point, in the feature's own unit.
        statistics (`FeatureStatistics`): of the same `D`.
        clip (`bool`, *optional*, defaults to `True`): limit the result to [-1, 1]. Without it `unnormalize` is the
            exact inverse, to rounding.

    Returns:
        The same type, shape and dtype as `values`.

    Raises:
        TypeError: `values` is not floating point.
        ValueError: the last dimension differs from the statistics', or a value is NaN or infinite.
    """
    centre, half_range = _centre_and_half_range(values, statistics)
    mapped = (values - centre) / half_range
    if clip:
        mapped = mapped.clip(-1.0, 1.0)
    return _as_type_of(mapped, values)


def unnormalize(values: Values, statistics: FeatureStatistics) -> Values:
    """
    Inverse of `normalize(..., clip=False)`: `x = y h + c`.

    Args:
        values (`np.ndarray` or `torch.Tensor` of shape `(..., D)`): floating point, normalised.
        statistics (`FeatureStatistics`): of the same `D`.

    Returns:
        The same type, shape and dtype as `values`, in the feature's own unit.

    Raises:
        TypeError: `values` is not floating point.
        ValueError: the last dimension differs from the statistics', or a value is NaN or infinite.
    """
    centre, half_range = _centre_and_half_range(values, statistics)
    return _as_type_of(values * half_range + centre, values)


def quantile_map(statistics: FeatureStatistics) -> tuple[np.ndarray, np.ndarray]:
    """The centre and half-range, float64 of shape `(D,)` each, that `normalize` and `unnormalize` use."""
    q01, q99, low, high = (np.asarray(getattr(statistics, key)) for key in ("q01", "q99", "min", "max"))
    still = (q99 - q01) / 2 < MINIMUM_HALF_RANGE
    low, high = np.where(still, low, q01), np.where(still, high, q99)
    return (low + high) / 2, np.maximum((high - low) / 2, MINIMUM_HALF_RANGE)


def _centre_and_half_range(values: Values, statistics: FeatureStatistics) -> tuple[Values, Values]:
    name = statistics.name
    if values.ndim == 0 or values.shape[-1] != statistics.dimension:
        raise ValueError(
            f"'{name}' of shape {tuple(values.shape)} does not fit its statistics: "
            f"expected (..., {statistics.dimension})"
        )
    _require_finite(values, name)
    centre, half_range = quantile_map(statistics)
    # Half-precision values are mapped in float32: a centre rounded to bfloat16 would shift the whole dimension.
    if isinstance(values, torch.Tensor):
        dtype = torch.promote_types(values.dtype, torch.float32)
        return (
            torch.as_tensor(centre, dtype=dtype, device=values.device),
            torch.as_tensor(half_range, dtype=dtype, device=values.device),
        )
    precision = np.promote_types(values.dtype, np.float32)
    return centre.astype(precision), half_range.astype(precision)


def _as_type_of(mapped: Values, values: Values) -> Values:
    if isinstance(mapped, torch.Tensor):
        return mapped.to(values.dtype)
    return mapped.astype(values.dtype)


def _require_finite(values: np.ndarray | torch.Tensor, name: str) -> None:
    if isinstance(values, torch.Tensor):
        floating, finite = values.is_floating_point(), torch.isfinite(values)
    else:
        floating, finite = np.issubdtype(values.dtype, np.floating), np.isfinite(values)
    if not floating:
        raise TypeError(f"'{name}' must be floating point, found {values.dtype}")
    if not bool(finite.all()):
        index = (~finite).nonzero()[0]
        where = index.tolist() if isinstance(index, torch.Tensor) else np.argwhere(~finite)[0].tolist()
        raise ValueError(f"'{name}' holds NaN or infinity, first at index {where}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _require_keys(values: Any, expected: set[str], what: str) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{what}: expected the keys {sorted(expected)}, found {values!r}")
    if missing := sorted(expected - set(values)):
        raise ValueError(f"{what}: missing {missing}")
    if unknown := sorted(set(values) - expected):
        raise ValueError(f"{what}: unknown {unknown}")
