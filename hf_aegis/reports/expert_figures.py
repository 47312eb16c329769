"""What routed experts did: how evenly tokens were spread over them, and what training made of their spectra."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hf_aegis.reports.run_files import Records
from hf_aegis.reports.style import CONDITION_STYLES, WIDTH, figure_style, group_labels, group_order


class Routing(NamedTuple):
    """Means over runs and a layer's linears, at the steps that all runs have logged (S), by decoder layer (G)."""

    steps: np.ndarray
    groups: list[str]
    entropy: np.ndarray
    """`(G, S)`: the tokens' routing entropy as a share of the largest possible."""
    busiest: np.ndarray
    """`(G, S)`: the load of the busiest expert, in multiples of an even load."""


def layer_group(name: str) -> str:
    """The decoder layer that a linear layer belongs to, or the linear's own name."""
    found = re.search(r"layers\.\d+", name)
    if not found:
        return name
    return f"vision {found[0]}" if "vision" in name else found[0]


def summed_routing(runs: Sequence[Records]) -> Routing:
    """
    How even the routing was.

    Args:
        runs (`Sequence[Records]`): The lines of each run's `experts.jsonl`.

    Raises:
        ValueError: If the runs have no step in common.
    """
    common = set.intersection(*({record["step"] for record in records} for records in runs))
    if not common:
        raise ValueError("experts.jsonl: the runs have logged no step in common")
    steps = sorted(common)
    groups = group_order({layer_group(name) for records in runs for record in records for name in record["layers"]})
    entropy, busiest = (np.zeros((len(groups), len(steps))) for _ in range(2))
    count = np.zeros_like(entropy)
    for records in runs:
        for record in records:
            if record["step"] not in common:
                continue
            column = steps.index(record["step"])
            for name, figures in record["layers"].items():
                row = groups.index(layer_group(name))
                experts, load = len(figures["load"]), figures["load"]
                # One expert alone is even however it is routed to.
                entropy[row, column] += figures["entropy"] / math.log(experts) if experts > 1 else 1.0
                busiest[row, column] += max(load) * experts / sum(load) if sum(load) else np.nan
                count[row, column] += 1
    with np.errstate(invalid="ignore", divide="ignore"):
        return Routing(np.asarray(steps), groups, entropy / count, busiest / count)


def plot_routing(runs: Sequence[Records], path: Path, condition: str) -> None:
    """Entropy and the busiest expert's load over training: as means with the range over layers, and layer by layer."""
    routing = summed_routing(runs)
    color = CONDITION_STYLES.get(condition, CONDITION_STYLES["aegis"])["color"]
    height = max(1.6, 0.19 * len(routing.groups) + 0.5)
    panels = (
        (100 * routing.entropy, "routing entropy\n(% of even routing)"),
        (routing.busiest, "busiest expert's load\n(× an even load)"),
    )
    with figure_style() as pyplot:
        figure, axes = pyplot.subplots(
            2, 2, figsize=(WIDTH, 2.8 + height), height_ratios=(2.2, height), sharex=True, squeeze=False
        )
        for (values, label), curve, image in zip(panels, axes[0], axes[1], strict=True):
            curve.plot(routing.steps, np.nanmean(values, axis=0), color=color, marker="o", markersize=3)
            curve.fill_between(
                routing.steps,
                np.nanmin(values, axis=0),
                np.nanmax(values, axis=0),
                color=color,
                alpha=0.2,
                linewidth=0,
            )
            curve.set_ylabel(label)
            mesh = image.pcolormesh(
                _edges(routing.steps),
                np.arange(len(routing.groups) + 1) - 0.5,
                values,
                cmap="viridis",
                rasterized=True,
            )
            image.set_ylim(len(routing.groups) - 0.5, -0.5)
            image.set_yticks(range(len(routing.groups)), group_labels(routing.groups), fontsize=9)
            image.set_xlabel("step")
            image.grid(False)
            figure.colorbar(mesh, ax=image, location="bottom", aspect=40)
        figure.savefig(path, format="png")
        pyplot.close(figure)


def plot_expert_spectra(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """
    Singular values of the experts before and after training and of the difference, as geometric means over linear
    layers and runs; and the length of the difference, layer by layer.

    Args:
        runs (`Sequence[Mapping]`): What [`~evaluation.expert_spectra.ExpertSpectra.compare`] measured in each.
    """
    groups = group_order({layer_group(entry["name"]) for entry in runs[0]["layers"]})
    looks = {
        "before": {"color": "#000000", "linestyle": "--", "label": "experts before"},
        "after": {"color": "#0072B2", "linestyle": "-", "label": "experts after"},
        "update": {"color": "#D55E00", "linestyle": ":", "label": "difference"},
    }
    with figure_style() as pyplot:
        figure, (spectra, lengths) = pyplot.subplots(1, 2, figsize=(WIDTH, 3.4))
        for key, look in looks.items():
            values = _geometric_mean([entry[key] for of_run in runs for entry in of_run["layers"]])
            spectra.semilogy(np.arange(1, len(values) + 1), values, marker="o", markersize=3, **look)
        spectra.set_xlabel("singular value, by rank")
        spectra.set_ylabel("size (units of the weight)")
        spectra.legend()
        shares = [[100 * share for share in _update_lengths(of_run, groups)] for of_run in runs]
        mean = np.nanmean(shares, axis=0)
        bars = np.nanstd(shares, axis=0, ddof=1) if len(runs) > 1 else None
        lengths.errorbar(range(len(groups)), mean, yerr=bars, capsize=3, color="#D55E00", marker="s", elinewidth=1.2)
        lengths.set_xlabel("decoder layer")
        lengths.set_ylabel("length of the difference\n(% of the experts' before)")
        lengths.set_xticks(range(0, len(groups), math.ceil(len(groups) / 10)))
        lengths.set_ylim(bottom=0)
        figure.savefig(path, format="png")
        pyplot.close(figure)


def _geometric_mean(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """Over those with the value at that place; ends where half of the rows do, or rounding begins."""
    length = int(np.median([len(row) for row in rows]))
    columns = [[row[i] for row in rows if len(row) > i and row[i] > 1e-7 * row[0]] for i in range(length)]
    filled = [column for column in columns if 2 * len(column) >= len(rows)]
    return np.asarray([np.exp(np.mean(np.log(column))) for column in filled])


def _update_lengths(of_run: Mapping[str, Any], groups: Sequence[str]) -> list[float]:
    """Frobenius norm of the difference, relative to that of the experts before, root mean square over a layer."""
    squares = {group: [0.0, 0.0] for group in groups}
    for entry in of_run["layers"]:
        total = squares[layer_group(entry["name"])]
        total[0] += sum(value**2 for value in entry["update"])
        total[1] += sum(value**2 for value in entry["before"])
    return [math.sqrt(update / before) if before > 0 else math.nan for update, before in squares.values()]


def _edges(steps: np.ndarray) -> np.ndarray:
    """Edges of columns that are centred at the steps."""
    if len(steps) == 1:
        return np.asarray([steps[0] - 0.5, steps[0] + 0.5])
    middle = (steps[1:] + steps[:-1]) / 2
    return np.concatenate(([2 * steps[0] - middle[0]], middle, [2 * steps[-1] - middle[-1]]))
