"""How task gradient and reference agree, neuron by neuron (arXiv 2604.16067, figure 6)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_aegis.reports.style import CONDITION_STYLES, WIDTH, figure_style, group_labels, group_order


def summed_counts(histograms: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, list[str], np.ndarray]:
    """
    Edges `(B + 1,)` of the bins, names of the groups, lowest layer first, and counts `(G, B)` summed over runs.

    Raises:
        ValueError: If two runs counted in other bins.
    """
    edges = np.asarray(histograms[0]["edges"], dtype=float)
    for histogram in histograms[1:]:
        if not np.array_equal(edges, histogram["edges"]):
            raise ValueError("neuron_cosines.json: the runs counted in different bins")
    groups = group_order({group for histogram in histograms for group in histogram["counts"]})
    empty = np.zeros(len(edges) - 1)
    counts = [sum((np.asarray(h["counts"].get(group, empty)) for h in histograms), empty) for group in groups]
    return edges, groups, np.stack(counts)


def plot_neuron_cosines(histograms: Sequence[Mapping[str, Any]], path: Path) -> None:
    """
    The distribution over all neurons, of each run as a thin outline and of all together, the same for each group as a
    map, and each group's share in conflict.
    """
    edges, groups, counts = summed_counts(histograms)
    totals = [summed_counts([histogram])[2].sum(axis=0) for histogram in histograms]
    totals = [total for total in totals if total.any()]
    centres = (edges[:-1] + edges[1:]) / 2
    total = counts.sum(axis=0)
    of_group = counts.sum(axis=1, keepdims=True)
    shares = 100 * np.divide(counts, of_group, out=np.zeros_like(counts), where=of_group > 0)
    # All but one neuron in two thousand are shown.
    reach = np.cumsum(total) / total.sum()
    limit = max(abs(centres[np.searchsorted(reach, 0.00025)]), abs(centres[np.searchsorted(reach, 0.99975)]), 0.05)
    # So near to the end there is no reason not to show it.
    limit = 1.0 if limit > 0.95 else limit
    color = CONDITION_STYLES["aegis"]["color"]
    map_height = max(1.9, 0.19 * len(groups) + 0.6)
    with figure_style() as pyplot:
        figure, (overall, by_group) = pyplot.subplots(
            2, 1, figsize=(WIDTH, 3.4 + map_height), height_ratios=(2.2, map_height + 0.4), sharex=True
        )
        percent = 100 * total / total.sum()
        overall.stairs(percent, edges, fill=True, color=color, alpha=0.25)
        for of_run in totals if len(totals) > 1 else ():
            overall.stairs(100 * of_run / of_run.sum(), edges, color=color, alpha=0.5, linewidth=0.6)
        overall.stairs(percent, edges, color=color, linewidth=1.5)
        overall.axvline(0, color="black", linewidth=0.8)
        overall.set_ylabel("neurons (%)")
        overall.set_title(f"all neurons: {_in_conflict(totals, edges)} in conflict", fontsize=11, loc="left")
        rows = np.arange(len(groups) + 1) - 0.5
        image = by_group.pcolormesh(edges, rows, shares, cmap="Blues", rasterized=True)
        by_group.axvline(0, color="black", linewidth=0.8)
        by_group.set_ylim(len(groups) - 0.5, -0.5)
        by_group.set_yticks(range(len(groups)), group_labels(groups), fontsize=9)
        by_group.set_xlabel("cosine of task gradient and reference, per neuron")
        by_group.set_xlim(-limit, limit)
        by_group.grid(False)
        beside = by_group.twinx()
        beside.set_ylim(by_group.get_ylim())
        negative = shares[:, _negative(edges)].sum(axis=1)
        beside.set_yticks(range(len(groups)), [f"{share:.1f} %" for share in negative], fontsize=9)
        beside.tick_params(right=False)
        beside.text(1.01, 1.02, "in conflict", transform=beside.transAxes, fontsize=9)
        beside.grid(False)
        figure.colorbar(image, ax=[by_group, beside], location="bottom", aspect=50, label="neurons of the group (%)")
        figure.savefig(path, format="png")
        pyplot.close(figure)


def _in_conflict(totals: Sequence[np.ndarray], edges: np.ndarray) -> str:
    """Share of neurons with a negative cosine, over all runs, and from which run's to which run's it is."""
    shares = [100 * total[_negative(edges)].sum() / total.sum() for total in (np.sum(totals, axis=0), *totals)]
    text = f"{shares[0]:.1f} %"
    return text if len(totals) == 1 else f"{text} ({min(shares[1:]):.1f} to {max(shares[1:]):.1f} % by run)"


def _negative(edges: np.ndarray) -> np.ndarray:
    """Which bins hold negative cosines alone; the edge at zero may be off by rounding."""
    return edges[1:] <= 1e-12
