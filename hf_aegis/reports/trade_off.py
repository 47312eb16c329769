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
        logarithmic (`bool`, *optional*, defaults to `False`): Whether the axis is, so that it shows no zero.
    """

    key: str
    label: str
    scale: float = 1.0
    logarithmic: bool = False

    def shows(self, value: float) -> bool:
        """Whether the axis has a place for a value."""
        return value > 0 or not self.logarithmic


FLOW_MSE = Measure("flow_mse", "flow MSE on held-out demonstrations (← better)")
STEP_TIME = Measure("step_ms", "time of an optimiser step (ms, ← better)")
VQA_ACCURACY = Measure("vqa_accuracy", "VQA accuracy after training (%, ↑ better)", 100.0)
VQA_CROSS_ENTROPY = Measure(
    "vqa_cross_entropy", "VQA cross-entropy after training (nats per token, ↓ better)", logarithmic=True
)


def plottable(conditions: Mapping[str, Any], task: Measure = FLOW_MSE, retention: Measure = VQA_ACCURACY) -> list[str]:
    """Names of the conditions that have both measures, with values that the axes can show."""
    return [
        name
        for name, condition in conditions.items()
        if all(
            (mean := _mean(condition, measure.key)) is not None and measure.shows(mean)
            for measure in (task, retention)
        )
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
    each side: by default VQA accuracy over held-out flow MSE, where better is up and to the left. On a logarithmic
    axis bars are as long downwards as upwards, so that none reaches zero.

    Args:
        conditions (`Mapping`): As [`results_table.collect_results`] aggregates them.
        names (`Sequence[str]`): Which of them to draw; all have both measures.
        before (`Mapping`, *optional*): Scores of the model before training; that of `retention` is drawn as a level.
        path (`Path`): The PNG to write.
        task ([`Measure`], *optional*): To the right.
        retention ([`Measure`], *optional*): Upwards.
    """
    styles = condition_styles(names)
    level = (before or {}).get(retention.key)
    level = retention.scale * level if level is not None and retention.shows(level) else None
    horizontal = {name: _Bar.of(conditions[name], task) for name in names}
    vertical = {name: _Bar.of(conditions[name], retention) for name in names}
    with figure_style() as pyplot:
        figure, axis = pyplot.subplots(figsize=(WIDTH, 5.4))
        axis.set_xscale("log" if task.logarithmic else "linear")
        axis.set_yscale("log" if retention.logarithmic else "linear")
        boxes = []
        for name in names:
            x, y = horizontal[name], vertical[name]
            look = {key: styles[name][key] for key in ("color", "marker")}
            _, caps, bars = axis.errorbar(
                *(x.mean, y.mean, y.lengths, x.lengths),
                **{**look, "linestyle": "", "markersize": 9, "markeredgecolor": "white", "zorder": 4},
                **{"capsize": 3, "elinewidth": 1.2},
            )
            # Where many conditions meet, the markers are what is to be seen.
            for part in (*caps, *bars):
                part.set(alpha=0.45, zorder=3)
            boxes += [(x.low, y.mean, x.high, y.mean), (x.mean, y.low, x.mean, y.high)]
        if level is not None:
            axis.axhline(level, **{**CONDITION_STYLES["pretrained"], "linewidth": 1.2})
            left, right = axis.get_xlim()
            boxes.append((left, level, right, level))
            axis.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.1)
        axis.margins(x=0.12, y=0.1)
        axis.set_xlabel(task.label)
        axis.set_ylabel(retention.label)
        positions = {name: (horizontal[name].mean, vertical[name].mean) for name in names}
        annotate(axis, positions, {name: styles[name]["label"] for name in names}, boxes)
        figure.savefig(path, format="png")
        pyplot.close(figure)


class _Bar(NamedTuple):
    """A measure of a condition and where its bar ends, as drawn."""

    low: float
    mean: float
    high: float

    @classmethod
    def of(cls, condition: Mapping[str, Any], measure: Measure) -> "_Bar":
        values = condition["measures"][measure.key]
        mean, spread = values["mean"], values["std"] or 0.0
        low = mean**2 / (mean + spread) if measure.logarithmic else mean - spread
        return cls(*(measure.scale * value for value in (low, mean, mean + spread)))

    @property
    def lengths(self) -> list[list[float]] | None:
        """To both sides, as matplotlib has them; `None` where there is no bar."""
        return [[self.mean - self.low], [self.high - self.mean]] if self.high > self.low else None


def _mean(condition: Mapping[str, Any], key: str) -> float | None:
    return condition["measures"].get(key, {}).get("mean")
