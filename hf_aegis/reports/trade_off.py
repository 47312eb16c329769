"""Retention against plasticity: what each condition still answers, and how well it acts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_aegis.reports.label_placement import annotate
from hf_aegis.reports.style import CONDITION_STYLES, WIDTH, condition_styles, figure_style


def plottable(conditions: Mapping[str, Any]) -> list[str]:
    """The conditions that have both measures, of `collect_results`'s `conditions`."""
    return [
        name
        for name, condition in conditions.items()
        if all(_mean(condition, key) is not None for key in ("vqa_accuracy", "flow_mse"))
    ]


def plot_trade_off(
    conditions: Mapping[str, Any], names: Sequence[str], before: Mapping[str, Any] | None, path: Path
) -> None:
    """
    VQA accuracy over held-out flow MSE, one labelled marker per condition, with one standard deviation over seeds to
    each side. Better is up and to the left.

    Args:
        conditions (`Mapping`): As [`results_table.collect_results`] aggregates them.
        names (`Sequence[str]`): Which of them to draw; all have both measures.
        before (`Mapping`, *optional*): Scores of the model before training, drawn as a level.
        path (`Path`): The PNG to write.
    """
    styles = condition_styles(names)
    with figure_style() as pyplot:
        figure, axis = pyplot.subplots(figsize=(WIDTH, 5.4))
        positions, boxes = {}, []
        for name in names:
            measures = conditions[name]["measures"]
            x, dx = measures["flow_mse"]["mean"], measures["flow_mse"]["std"] or 0.0
            y, dy = (100 * (measures["vqa_accuracy"][key] or 0.0) for key in ("mean", "std"))
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
        if before is not None and before.get("vqa_accuracy") is not None:
            level = 100 * before["vqa_accuracy"]
            axis.axhline(level, **{**CONDITION_STYLES["pretrained"], "linewidth": 1.2})
            left, right = axis.get_xlim()
            boxes.append((left, level, right, level))
            axis.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.1)
        axis.margins(x=0.12, y=0.1)
        axis.set_xlabel("flow MSE on held-out demonstrations (← better)")
        axis.set_ylabel("VQA accuracy after training (%, ↑ better)")
        annotate(axis, positions, {name: styles[name]["label"] for name in names}, boxes)
        figure.savefig(path, format="png")
        pyplot.close(figure)


def _mean(condition: Mapping[str, Any], key: str) -> float | None:
    return condition["measures"].get(key, {}).get("mean")
