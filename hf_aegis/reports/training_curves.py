"""Curves of training runs: VQA loss, flow loss, and what the projection did (arXiv 2604.16067, figures 3 to 5)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hf_aegis.reports.bands import band, smooth
from hf_aegis.reports.run_files import Records
from hf_aegis.reports.style import (
    CONDITION_STYLES,
    WIDTH,
    Panel,
    condition_panels,
    condition_styles,
    figure_style,
    group_labels,
    group_order,
)


SeedRuns = Mapping[str, Sequence[Records]]
"""Conditions, each with the records of its runs, one run per seed."""


class _Curve(NamedTuple):
    key: str
    label: str
    scale: float = 1.0
    # Of a loss on batches, which scatters: the mean over neighbouring steps is drawn, and the curve itself faintly.
    smooth: bool = False
    # Zero means something that is not on the axis otherwise.
    from_zero: bool = True
    # Where the largest value is so many times the smallest, conditions near zero would be one line.
    logarithmic_from: float = math.inf


_VQA = (
    _Curve("vqa_cross_entropy", "VQA cross-entropy\n(nats per token)", logarithmic_from=30),
    _Curve("vqa_accuracy", "VQA accuracy (%)", 100, from_zero=False),
)
_FLOW = (
    _Curve("flow_mse", "flow MSE\non training batches", smooth=True),
    _Curve("eval_flow_mse", "flow MSE on held-out\ndemonstrations", from_zero=False),
)
_PROJECTION = (
    _Curve("throttle_rate", "groups in\nconflict (%)", 100),
    _Curve("energy_shed", "gradient energy\nshed (%)", 100),
    _Curve("cosine", "cosine of task and\nreference gradient", from_zero=False),
    # Whichever the reference is the gradient of.
    _Curve("penalty", "transport\npenalty"),
    _Curve("replay_loss", "loss on the\nreplayed batch"),
)
# Of cells of the map without a finite cosine; not among the colours of cosines.
_MISSING_COLOR = "0.7"
_MOST_CELLS = 5_000_000
# About as wide is the map.
_MAP_PIXELS = 1000


def plot_vqa(runs: Mapping[str, Records], path: Path) -> None:
    """VQA cross-entropy and accuracy on the hold-out over training steps, one line per condition."""
    plot_vqa_over_seeds({name: [records] for name, records in runs.items()}, path)


def plot_flow(runs: Mapping[str, Records], loss_scale: float, path: Path) -> None:
    """
    Flow-matching MSE on training batches and on held-out demonstrations over training steps. Runs that logged their
    scaled loss alone are divided by `loss_scale`.
    """
    plot_flow_over_seeds({name: [_unscaled(records, loss_scale)] for name, records in runs.items()}, path)


def plot_projection(metrics: Records, projection: Records, path: Path) -> None:
    """Throttle rate, energy shed, cosine and penalty over training steps, and a map of conflicts by layer and step."""
    plot_projection_over_seeds([metrics], [projection], path)


def plot_vqa_over_seeds(runs: SeedRuns, path: Path) -> None:
    """As [`plot_vqa`], with the mean over each condition's seeds and a band around it."""
    _plot(runs, _VQA, path, before_training=True)


def plot_flow_over_seeds(runs: SeedRuns, path: Path) -> None:
    """As [`plot_flow`] of logged MSEs, with the mean over each condition's seeds and a band around it."""
    _plot(runs, _FLOW, path)


def plot_projection_over_seeds(
    metrics: Sequence[Records], projections: Sequence[Records], path: Path, condition: str = "aegis"
) -> None:
    """As [`plot_projection`], with means over the runs of one condition, one per seed."""
    groups, cosines = conflict_map(projections)
    style = condition_styles([condition])[condition]
    logged = logged_curves({condition: metrics}, (curve.key for curve in _PROJECTION))
    curves = [curve for curve in _PROJECTION if curve.key in logged]
    rows = math.ceil(len(curves) / 2)
    map_height = max(2.4, 0.17 * len(groups) + 0.8)
    with figure_style() as pyplot:
        figure = pyplot.figure(figsize=(WIDTH, 2.2 * rows + map_height))
        grid = figure.add_gridspec(rows + 1, 2, height_ratios=(*[2.2] * rows, map_height))
        for index, curve in enumerate(curves):
            # The last one of an odd number has a row for itself.
            alone = index == len(curves) - 1 and index % 2 == 0
            axis = figure.add_subplot(grid[index // 2, :] if alone else grid[index // 2, index % 2])
            # Nothing to tell it from.
            _draw(axis, metrics, curve, {**style, "marker": "", "linestyle": "-"})
            if curve.from_zero:
                axis.set_ylim(bottom=0)
            else:
                axis.axhline(0, color="black", linewidth=0.8)
            axis.set_ylabel(curve.label)
            axis.set_xlabel("training step")
        _draw_map(figure, figure.add_subplot(grid[rows, :]), groups, cosines)
        figure.savefig(path, format="png")
        pyplot.close(figure)


def _draw_map(figure: Any, axis: Any, groups: Sequence[str], cosines: np.ndarray) -> None:
    """A row per group, a column per step; cells without a cosine are grey, unlike those whose cosine is zero."""
    finite = np.abs(cosines[np.isfinite(cosines)])
    limit = (float(np.quantile(finite, 0.98)) if len(finite) else 0.0) or 1.0
    axis.set_facecolor(_MISSING_COLOR)
    image = axis.imshow(
        cosines,
        aspect="auto",
        cmap="PuOr",
        vmin=-limit,
        vmax=limit,
        # Several steps on one pixel are averaged rather than one of them picked.
        interpolation="auto" if cosines.shape[1] > _MAP_PIXELS else "nearest",
        extent=(0.5, cosines.shape[1] + 0.5, len(groups) - 0.5, -0.5),
    )
    axis.set_yticks(range(len(groups)), group_labels(groups), fontsize=9)
    for between in range(1, len(groups)):
        axis.axhline(between - 0.5, color="white", linewidth=1.0 if len(groups) < 12 else 0.4)
    axis.set_xlabel("training step")
    axis.grid(False)
    missing = "; grey: none that is finite" if len(finite) < cosines.size else ""
    figure.colorbar(
        image,
        ax=axis,
        location="bottom",
        aspect=50,
        pad=0.03,
        extend="both",
        label=f"cosine of the group (negative: conflict{missing})",
    )


def conflict_map(projections: Sequence[Records]) -> tuple[list[str], np.ndarray]:
    """
    Groups, lowest layer first, and the mean cosine of each at each step over runs and backward passes, `(G, S)`.

    Raises:
        ValueError: If there are more groups and steps than a map is made of.
    """
    records = [record for projection in projections for record in projection]
    groups = group_order({group for record in records for group in record["groups"]})
    row = {group: index for index, group in enumerate(groups)}
    last = max(record["step"] for record in records)
    if len(groups) * last > _MOST_CELLS:
        raise ValueError(
            f"projection.jsonl: {len(groups)} groups at steps up to {last} are too many for a map of at most "
            f"{_MOST_CELLS} cells"
        )
    sums = np.zeros((len(groups), last))
    counts = np.zeros_like(sums)
    for record in records:
        for group, cosine in zip(record["groups"], record["cosine"], strict=True):
            if cosine is not None:
                sums[row[group], record["step"] - 1] += cosine
                counts[row[group], record["step"] - 1] += 1
    return groups, np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _unscaled(records: Records, loss_scale: float) -> list[dict[str, Any]]:
    unscaled = []
    for record in records:
        of_loss = {
            mse: record[loss] / loss_scale
            for loss, mse in (("loss", "flow_mse"), ("eval_loss", "eval_flow_mse"))
            if record.get(loss) is not None
        }
        unscaled.append({**of_loss, **record})
    return unscaled


def logged_curves(runs: SeedRuns, keys: Iterable[str]) -> list[str]:
    """Those of `keys` of which any run has a finite value: the ones that are drawn."""
    return [key for key in keys if any(np.isfinite(band(own, key).mean).any() for own in runs.values())]


def _plot(runs: SeedRuns, curves: Sequence[_Curve], path: Path, before_training: bool = False) -> None:
    """
    A row of axes for each panel of conditions, a column for each curve that any run has logged, and one for legends.
    """
    panels = condition_panels(runs)
    logged = logged_curves(runs, (curve.key for curve in curves))
    curves = [curve for curve in curves if curve.key in logged]
    with figure_style() as pyplot:
        figure = pyplot.figure(figsize=(WIDTH, 2.6 * len(panels) + 0.5))
        if not curves:
            figure.text(0.5, 0.5, "no run was long enough to log this", ha="center")
        # The last column holds the longest label, so that all rows are alike.
        grid = figure.add_gridspec(len(panels), len(curves) + 1, width_ratios=(*[1] * len(curves), 0.36 * len(curves)))
        columns: list[list[Any]] = [[] for _ in curves]
        for row, panel in enumerate(panels if curves else ()):
            axes = []
            for index, (curve, column) in enumerate(zip(curves, columns, strict=True)):
                shown = {*panel.references, *panel.conditions}
                if not logged_curves({name: runs[name] for name in shown}, [curve.key]):
                    continue
                axes.append(figure.add_subplot(grid[row, index], sharex=column[0] if column else None))
                column.append(axes[-1])
                _draw_panel(axes[-1], runs, panel, curve)
                if before_training:
                    _draw_before(axes[-1], runs, curve)
            if not axes:
                continue
            axes[0].set_title(panel.title, fontsize=11, fontweight="bold", loc="left")
            beside = figure.add_subplot(grid[row, -1])
            beside.axis("off")
            # Curves that are smoothed have no markers; the last ones do.
            entries = {
                label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
            }
            beside.legend(entries.values(), entries.keys(), loc="center left", handlelength=2.6)
        for column, curve in zip(columns, curves, strict=True):
            column[-1].set_xlabel("training step")
            _share_scale(column, curve)
        figure.savefig(path, format="png")
        pyplot.close(figure)


def _draw_panel(axis: Any, runs: SeedRuns, panel: Panel, curve: _Curve) -> None:
    styles = condition_styles([*panel.references, *panel.conditions])
    for name in panel.references:
        faint = {"alpha": 0.45, "linewidth": 1.3, "marker": "", "label": f"{styles[name]['label']} (again)"}
        _draw(axis, runs[name], curve, {**styles[name], **faint}, reference=True)
    for name in panel.conditions:
        _draw(axis, runs[name], curve, styles[name])
    axis.set_ylabel(curve.label)


def _draw(
    axis: Any, runs: Sequence[Records], curve: _Curve, style: Mapping[str, Any], reference: bool = False
) -> None:
    steps, mean, low, high = (np.asarray(values) for values in band(runs, curve.key))
    if not np.isfinite(mean).any():
        return
    line = curve.scale * mean
    if curve.smooth:
        window = max(1, len(line) // 15)
        if not reference:
            axis.plot(steps, line, color=style["color"], alpha=0.3, linewidth=0.8)
        line, low, high = smooth(line, window), smooth(low, window), smooth(high, window)
        style = {**style, "marker": ""}
    # At most about ten markers: they tell lines apart, not the steps that were measured.
    axis.plot(steps, line, **{"markevery": max(1, len(steps) // 10), **style})
    if len(runs) > 1 and not reference:
        axis.fill_between(steps, curve.scale * low, curve.scale * high, color=style["color"], alpha=0.15, linewidth=0)


def _draw_before(axis: Any, runs: SeedRuns, curve: _Curve) -> None:
    """The level before training, which is that of every condition: they have one start."""
    for of_condition in runs.values():
        found = band(of_condition, curve.key)
        if len(found.steps) and found.steps[0] == 0 and np.isfinite(found.mean[0]):
            axis.axhline(curve.scale * found.mean[0], **CONDITION_STYLES["pretrained"], zorder=1.5)
            return


def _share_scale(axes: Sequence[Any], curve: _Curve) -> None:
    heights = np.concatenate([line.get_ydata() for axis in axes for line in axis.lines if line.get_label()[0] != "_"])
    positive = heights[np.isfinite(heights) & (heights > 0)]
    logarithmic = len(positive) > 0 and positive.max() > curve.logarithmic_from * positive.min()
    limits = [axis.get_ylim() for axis in axes]
    for axis in axes:
        if logarithmic:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.set_ylim(positive.min() / 1.5, positive.max() * 1.5)
        else:
            bottom = 0 if curve.from_zero else min(low for low, _ in limits)
            axis.set_ylim(bottom, max(high for _, high in limits))
