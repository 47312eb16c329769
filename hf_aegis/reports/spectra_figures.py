"""Spectra of two losses' gradients, layer by layer, and how concentrated they are (arXiv 2604.16067, figure 1)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_aegis.reports.style import WIDTH, figure_style, group_labels


Spectra = Sequence[Mapping[str, Any]]
"""What [`~evaluation.gradient_spectra.gradient_spectra`] measured, one for each run."""

LOSSES: dict[str, dict[str, Any]] = {
    "cross_entropy": {"color": "#009E73", "linestyle": "-", "marker": "o", "label": "VQA cross-entropy"},
    "flow": {"color": "#D55E00", "linestyle": "--", "marker": "s", "label": "flow matching (MSE)"},
}
# In float32, below this share of the largest there is rounding alone.
_FLOOR = 1e-7
_INDEX = np.linspace(0, 1, 101)
_LEADING_SHARE = 0.05


def layer_names(spectra: Spectra) -> list[str]:
    """The layers of the first run, lowest first."""
    return [layer["name"] for layer in spectra[0]["layers"]]


def mean_spectra(spectra: Spectra, loss: str) -> np.ndarray:
    """
    Geometric mean over runs and a layer's matrices of the singular values relative to the largest, at 101 positions
    from the first to the last: `(layers, 101)`; NaN for a layer that the loss does not reach.
    """
    rows = []
    for values_of_layer in _by_layer(spectra, loss):
        logarithms = [
            np.interp(_INDEX, np.linspace(0, 1, len(values)), np.log(np.maximum(values / values[0], _FLOOR)))
            for values in values_of_layer
        ]
        rows.append(np.exp(np.mean(logarithms, axis=0)) if logarithms else np.full(len(_INDEX), np.nan))
    return np.stack(rows)


def mean_concentration(spectra: Spectra, loss: str, share: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """
    The concentration ratio of one direction, or of a `share` of all, as a mean over a layer's matrices: its mean and
    its standard deviation (divisor n − 1) over runs, each `(layers,)`. The mean is NaN for a layer that the loss does
    not reach, the deviation where fewer than two runs have a ratio.
    """
    per_run = np.asarray([_concentration(of_run, loss, share) for of_run in spectra])
    counts = np.isfinite(per_run).sum(axis=0)
    mean = np.divide(np.nansum(per_run, axis=0), counts, out=np.full(counts.shape, np.nan), where=counts > 0)
    squares = np.nansum(np.square(per_run - mean), axis=0)
    return mean, np.sqrt(np.divide(squares, counts - 1, out=np.full(counts.shape, np.nan), where=counts > 1))


def plot_spectra(spectra: Spectra, path: Path) -> None:
    """Small multiples: one panel per layer, one line per loss, and from the lowest to the highest run a band."""
    names = layer_names(spectra)
    means = {loss: mean_spectra(spectra, loss) for loss in LOSSES}
    per_run = {loss: np.stack([mean_spectra([of_run], loss) for of_run in spectra]) for loss in LOSSES}
    leading = {short: mean_concentration(spectra, loss) for loss, short in (("cross_entropy", "CE"), ("flow", "flow"))}
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    with figure_style() as pyplot:
        figure, axes = pyplot.subplots(
            rows, columns, figsize=(WIDTH, 2.1 * rows + 0.9), sharex=True, sharey=True, squeeze=False
        )
        for index, (axis, label) in enumerate(zip(axes.flat, group_labels(names), strict=False)):
            for loss, look in LOSSES.items():
                axis.semilogy(100 * _INDEX, means[loss][index], **{**look, "marker": ""})
                edges = (per_run[loss][:, index].min(axis=0), per_run[loss][:, index].max(axis=0))
                axis.fill_between(100 * _INDEX, *edges, color=look["color"], alpha=0.25, linewidth=0)
            axis.set_title(label, fontsize=10)
            box = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1}
            shares = (_leading_share(short, mean[index], spread[index]) for short, (mean, spread) in leading.items())
            axis.text(
                0.98,
                0.98,
                "\n".join(filter(None, shares)),
                transform=axis.transAxes,
                ha="right",
                va="top",
                fontsize=9,
                bbox=box,
            )
        for axis in axes.flat[len(names) :]:
            axis.set_visible(False)
        finite = np.concatenate([values[np.isfinite(values)] for values in per_run.values()])
        axes[0, 0].set_ylim(max(_FLOOR, finite.min()) / 1.5 if len(finite) else _FLOOR, 2)
        figure.supxlabel("position among the singular values (% of them)", fontsize=11)
        figure.supylabel("singular value / largest", fontsize=11)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
        figure.savefig(path, format="png")
        pyplot.close(figure)


def plot_concentration(spectra: Spectra, path: Path) -> None:
    """Concentration ratios over layers, with one standard deviation over runs to each side."""
    names = layer_names(spectra)
    panels = ((None, "first direction, ρ₁"), (_LEADING_SHARE, f"first {100 * _LEADING_SHARE:.0f} % of directions"))
    with figure_style() as pyplot:
        figure, axes = pyplot.subplots(1, 2, figsize=(WIDTH, 3.2))
        for axis, (share, title) in zip(axes, panels, strict=True):
            for loss, look in LOSSES.items():
                mean, deviation = mean_concentration(spectra, loss, share)
                bars = 100 * deviation if np.isfinite(deviation).any() else None
                axis.errorbar(range(len(names)), 100 * mean, yerr=bars, capsize=3, elinewidth=1.2, **look)
            axis.set_title(title, fontsize=11)
            axis.set_xlabel("decoder layer")
            axis.set_ylabel("share of the gradient's\nenergy (%)")
            # Markers at a hundred per cent stay whole.
            axis.set_ylim(0, 104)
            step = math.ceil(len(names) / 10)
            axis.set_xticks(range(0, len(names), step))
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
        figure.savefig(path, format="png")
        pyplot.close(figure)


def _concentration(of_run: Mapping[str, Any], loss: str, share: float | None) -> list[float]:
    import torch

    from hf_aegis.functional.spectra import concentration_ratio

    means = []
    for values_of_layer in _by_layer([of_run], loss):
        ratios = [
            concentration_ratio(torch.from_numpy(s), 1 if share is None else math.ceil(share * len(s))).item()
            for s in values_of_layer
        ]
        means.append(float(np.mean(ratios)) if ratios else math.nan)
    return means


def _leading_share(loss: str, mean: float, deviation: float) -> str:
    """The concentration ratio of the first direction, in words; none where there is no gradient."""
    if not np.isfinite(mean):
        return ""
    spread = f" ± {100 * deviation:.1f}" if np.isfinite(deviation) else ""
    return f"ρ₁ {loss} {100 * mean:.1f}{spread} %"


def _by_layer(spectra: Spectra, loss: str) -> list[list[np.ndarray]]:
    """For each layer, the singular values of all its matrices in all runs, without those that are all zero."""
    found: list[list[np.ndarray]] = [[] for _ in layer_names(spectra)]
    for of_run in spectra:
        for matrices, layer in zip(found, of_run["layers"], strict=True):
            arrays = (np.asarray(matrix[loss], dtype=float) for matrix in layer["matrices"].values())
            matrices.extend(values for values in arrays if values[0] > 0)
    return found
