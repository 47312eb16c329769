"""Hidden states before and after fine-tuning, on the plane in which they drift (arXiv 2604.16067, figure 2)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hf_aegis.reports.style import CONDITION_STYLES, WIDTH, figure_style


# Shorter than this share of AEGIS's drift, what is left of it beside naive's direction is no direction of its own.
_PARALLEL = 1e-2


@dataclass(frozen=True)
class DriftPlane:
    """
    A plane through the centroid of the base model's hidden states.

    Attributes:
        points (`dict[str, np.ndarray]`): Coordinates `(N, 2)` of `pretrained`, `naive` and `aegis`, the same samples.
        shares (`tuple[float, float]`): Each axis' share of all squared displacements from the base model.
        drifts (`dict[str, float]`): Length of the mean displacement of `naive` and of `aegis`.
        first_axis (`str`): Whose mean displacement the first axis is: `"naive"`, or `"aegis"` where naive has none.
        second_axis (`str`): Where the second axis comes from: `"aegis"`, or `"residual"` where that leaves nothing.
    """

    points: dict[str, np.ndarray]
    shares: tuple[float, float]
    drifts: dict[str, float]
    first_axis: str
    second_axis: str


def drift_plane(base: np.ndarray, naive: np.ndarray, aegis: np.ndarray) -> DriftPlane:
    """
    The plane spanned by the mean displacements from the base model to the naive and to the AEGIS model.

    The first axis is naive's mean displacement; the second what Gram–Schmidt leaves of AEGIS's. Where both drift in
    one direction, or one of them does not drift, the second axis is the first principal component of what the
    displacements do orthogonally to the first.

    Args:
        base, naive, aegis (`np.ndarray` of shape `(N, D)`): Hidden states of the same samples.

    Raises:
        ValueError: If shapes differ, or neither model has drifted.
    """
    if not base.shape == naive.shape == aegis.shape:
        raise ValueError(f"hidden states must have one shape, found {base.shape}, {naive.shape} and {aegis.shape}")
    displacements = {"naive": (naive - base).astype(float), "aegis": (aegis - base).astype(float)}
    means = {name: moved.mean(axis=0) for name, moved in displacements.items()}
    drifts = {name: float(np.linalg.norm(mean)) for name, mean in means.items()}
    if max(drifts.values()) == 0:
        raise ValueError("the hidden states of neither model have moved")
    first_axis = "naive" if drifts["naive"] else "aegis"
    first = means[first_axis] / drifts[first_axis]
    left = _orthogonal(means["aegis"], first)
    second_axis = "aegis"
    if np.linalg.norm(left) <= _PARALLEL * drifts["aegis"]:
        second_axis = "residual"
        stacked = np.concatenate(list(displacements.values()))
        beside = stacked - np.outer(stacked @ first, first)
        left = _orthogonal(np.linalg.svd(beside - beside.mean(axis=0), full_matrices=False)[2][0], first)
        # A principal component of nothing may point anywhere, even along the first axis.
        if np.linalg.norm(left) < 0.5:
            left = _orthogonal(np.eye(len(first))[np.abs(first).argmin()], first)
    second = left / np.linalg.norm(left)
    axes = np.stack([first, second])
    energy = sum(float(np.square(moved).sum()) for moved in displacements.values())
    along = sum(np.square(moved @ axes.T).sum(axis=0) for moved in displacements.values())
    origin = base.mean(axis=0)
    points = {name: (states - origin) @ axes.T for name, states in (("naive", naive), ("aegis", aegis))}
    points = {"pretrained": (base - origin) @ axes.T, **points}
    return DriftPlane(points, (float(along[0] / energy), float(along[1] / energy)), drifts, first_axis, second_axis)


def _orthogonal(vector: np.ndarray, axis: np.ndarray) -> np.ndarray:
    """What is left of a vector `(D,)` without its part along an axis of length one `(D,)`."""
    return vector - (vector @ axis) * axis


def plot_drift(planes: dict[int, DriftPlane], path: Path) -> None:
    """Samples, centroids and mean displacements on the drift plane, one panel per seed."""
    with figure_style() as pyplot:
        wide = len(planes) > 1
        figure, axes = pyplot.subplots(
            1, len(planes), figsize=(WIDTH if wide else 6.5, 3.6 if wide else 5.2), squeeze=False
        )
        for axis, (seed, plane) in zip(axes[0], planes.items(), strict=True):
            centroids = {name: points.mean(axis=0) for name, points in plane.points.items()}
            for name, points in plane.points.items():
                look = CONDITION_STYLES[name]
                marker = look["marker"] or "s"
                dots = {"s": 14, "alpha": 0.35, "linewidths": 0}
                axis.scatter(*points.T, color=look["color"], marker=marker, label=look["label"], **dots)
            for name in ("naive", "aegis"):
                axis.annotate(
                    "",
                    xy=tuple(centroids[name]),
                    xytext=tuple(centroids["pretrained"]),
                    arrowprops={"arrowstyle": "-|>", "color": CONDITION_STYLES[name]["color"], "linewidth": 2.5},
                    zorder=4,
                )
            for name, centroid in centroids.items():
                look = CONDITION_STYLES[name]
                ring = {"s": 70, "edgecolors": "white", "linewidths": 1.2, "zorder": 5}
                axis.scatter(*centroid, color=look["color"], marker=look["marker"] or "s", **ring)
            axis.set_aspect("equal", adjustable="datalim")
            first = CONDITION_STYLES[plane.first_axis]["label"]
            second = "AEGIS's drift,\northogonal to naive's" if plane.second_axis == "aegis" else "principal residual"
            axis.set_xlabel(f"{first}'s drift ({100 * plane.shares[0]:.0f} %)")
            axis.set_ylabel(f"{second} ({100 * plane.shares[1]:.0f} %)")
            axis.set_title(f"seed {seed}", fontsize=11)
        legend = figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
        for handle in legend.legend_handles:
            handle.set(alpha=1, sizes=[36])
        figure.savefig(path, format="png")
        pyplot.close(figure)
