"""Retention against plasticity: what each condition still knows, and how well it has learned the task."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hf_aegis.reports.label_placement import annotate
from hf_aegis.reports.style import CONDITION_STYLES, WIDTH, condition_styles, figure_style


class Measure(NamedTuple):
    """
    What an axis shows.

    Args:
        key (`str`): The measure among a condition's.
        label (`str`): Its name and unit, and which way is better.
        scale (`float`, *optional*, defaults to `1.0`): What the measure is multiplied by.
    """

    key: str
    label: str
    scale: float = 1.0


FLOW_MSE = Measure("flow_mse", "flow MSE on held-out demonstrations (← better)")
STEP_TIME = Measure("step_ms", "time of an optimiser step (ms, ← better)")
VQA_ACCURACY = Measure("vqa_accuracy", "VQA accuracy after training (%, ↑ better)", 100.0)


def plottable(conditions: Mapping[str, Any], task: Measure = FLOW_MSE, retention: Measure = VQA_ACCURACY) -> list[str]:
    """The conditions that have both measures, of `collect_results`'s `conditions`."""
    return [
        name
        for name, condition in conditions.items()
        if all(_mean(condition, measure.key) is not None for measure in (task, retention))
    ]


def plot_trade_off(
    conditions: Mapping[str, Any],
    names: Sequence[str],
    before: Mapping[str, Any] | None,
    path: Path,
    task: Measure = FLOW_MSE,
    retention: Measure = VQA_ACCURACY,
) -> None:
    """
    What is kept over what is learned, one labelled marker per condition, with one standard deviation over seeds to
    each side: by default VQA accuracy over held-out flow MSE, where better is up and to the left.

    Args:
        conditions (`Mapping`): As [`results_table.collect_results`] aggregates them.
        names (`Sequence[str]`): Which of them to draw; all have both measures.
        before (`Mapping`, *optional*): Scores of the model before training; that of `retention` is drawn as a level.
        path (`Path`): The PNG to write.
        task ([`Measure`], *optional*): To the right.
        retention ([`Measure`], *optional*): Upwards.
    """
    styles = condition_styles(names)
    with figure_style() as pyplot:
        figure, axis = pyplot.subplots(figsize=(WIDTH, 5.4))
        positions, boxes = {}, []
        for name in names:
            (x, dx), (y, dy) = (_mean_and_spread(conditions[name], measure) for measure in (task, retention))
            look = {key: styles[name][key] for key in ("color", "marker")}
            _, caps, bars = axis.errorbar(
                *(x, y, dy or None, dx or None),
                **{**look, "linestyle": "", "markersize": 9, "markeredgecolor": "white", "zorder": 4},
                **{"capsize": 3, "elinewidth": 1.2},
            )
            # Where many conditions meet, the markers are what is to be seen.
            for part in (*caps, *bars):
                part.set(alpha=0.45, zorder=3)
            positions[name] = (x, y)
            boxes += [(x - dx, y, x + dx, y), (x, y - dy, x, y + dy)]
        if before is not None and before.get(retention.key) is not None:
            level = retention.scale * before[retention.key]
            axis.axhline(level, **{**CONDITION_STYLES["pretrained"], "linewidth": 1.2})
            left, right = axis.get_xlim()
            boxes.append((left, level, right, level))
            axis.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.1)
        axis.margins(x=0.12, y=0.1)
        axis.set_xlabel(task.label)
        axis.set_ylabel(retention.label)
        annotate(axis, positions, {name: styles[name]["label"] for name in names}, boxes)
        figure.savefig(path, format="png")
        pyplot.close(figure)


def _mean(condition: Mapping[str, Any], key: str) -> float | None:
    return condition["measures"].get(key, {}).get("mean")


def _mean_and_spread(condition: Mapping[str, Any], measure: Measure) -> tuple[float, float]:
    values = condition["measures"][measure.key]
    return measure.scale * values["mean"], measure.scale * (values["std"] or 0.0)
