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


def mean_concentration(spectra: Spectra, loss: str, share: float | None = None) -> np.ndarray:
    """
    Mean over runs and a layer's matrices of the concentration ratio of one direction, or of a `share` of all:
    `(layers,)`; NaN for a layer that the loss does not reach.
    """
    import torch

    from hf_aegis.functional.spectra import concentration_ratio

    means = []
    for values_of_layer in _by_layer(spectra, loss):
        ratios = [
            concentration_ratio(torch.from_numpy(s), 1 if share is None else math.ceil(share * len(s))).item()
            for s in values_of_layer
        ]
        means.append(float(np.mean(ratios)) if ratios else math.nan)
    return np.asarray(means)


def plot_spectra(spectra: Spectra, path: Path) -> None:
    """Small multiples: one panel per layer, one line per loss."""
    names = layer_names(spectra)
    means = {loss: mean_spectra(spectra, loss) for loss in LOSSES}
    leading = {loss: mean_concentration(spectra, loss) for loss in LOSSES}
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    with figure_style() as pyplot:
        figure, axes = pyplot.subplots(
            rows, columns, figsize=(WIDTH, 2.1 * rows + 0.9), sharex=True, sharey=True, squeeze=False
        )
        for index, (axis, label) in enumerate(zip(axes.flat, group_labels(names), strict=False)):
            for loss, look in LOSSES.items():
                axis.semilogy(100 * _INDEX, means[loss][index], **{**look, "marker": ""})
            axis.set_title(label, fontsize=10)
            shares = "\n".join(
                f"ρ₁ {short} {100 * leading[loss][index]:.0f} %"
                for loss, short in (("cross_entropy", "CE"), ("flow", "flow"))
                if np.isfinite(leading[loss][index])
            )
            box = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1}
            axis.text(0.98, 0.98, shares, transform=axis.transAxes, ha="right", va="top", fontsize=9, bbox=box)
        for axis in axes.flat[len(names) :]:
            axis.set_visible(False)
        finite = np.concatenate([values[np.isfinite(values)] for values in means.values()])
        axes[0, 0].set_ylim(max(_FLOOR, finite.min()) / 1.5 if len(finite) else _FLOOR, 2)
        figure.supxlabel("position among the singular values (% of them)", fontsize=11)
        figure.supylabel("singular value / largest", fontsize=11)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
        figure.savefig(path, format="png")
        pyplot.close(figure)


def plot_concentration(spectra: Spectra, path: Path) -> None:
    """Concentration ratios over layers: of the first direction, and of the leading twentieth of all."""
    names = layer_names(spectra)
    panels = ((None, "first direction, ρ₁"), (_LEADING_SHARE, f"first {100 * _LEADING_SHARE:.0f} % of directions"))
    with figure_style() as pyplot:
        figure, axes = pyplot.subplots(1, 2, figsize=(WIDTH, 3.2))
        for axis, (share, title) in zip(axes, panels, strict=True):
            for loss, look in LOSSES.items():
                axis.plot(range(len(names)), 100 * mean_concentration(spectra, loss, share), **look)
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


def _by_layer(spectra: Spectra, loss: str) -> list[list[np.ndarray]]:
    """For each layer, the singular values of all its matrices in all runs, without those that are all zero."""
    found: list[list[np.ndarray]] = [[] for _ in layer_names(spectra)]
    for of_run in spectra:
        for matrices, layer in zip(found, of_run["layers"], strict=True):
            arrays = (np.asarray(matrix[loss], dtype=float) for matrix in layer["matrices"].values())
            matrices.extend(values for values in arrays if values[0] > 0)
    return found
