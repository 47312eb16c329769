"""Figures of one run, for its card."""

import logging
from pathlib import Path

from hf_aegis.reports.style import require_matplotlib
from hf_aegis.reports.training_curves import (
    logged_curves,
    plot_flow_over_seeds,
    plot_projection,
    plot_vqa_over_seeds,
)
from hf_aegis.training.json_lines import METRICS_FILE, PROJECTION_FILE, JSONLines


logger = logging.getLogger(__name__)

FIGURES_FOLDER = "figures"


def draw_run_figures(folder: Path) -> list[Path]:
    """
    Draws what a run has logged, as far as there is something to draw: answers and flow loss over its steps, and what
    the projection did. Without matplotlib, which is optional, there are no figures, and a warning says so.

    Args:
        folder (`Path`): The run's output folder; figures go to `figures/` in it.

    Returns:
        `list[Path]`: the figures.
    """
    if not (folder / METRICS_FILE).is_file():
        return []
    try:
        require_matplotlib()
    except ImportError as error:
        logger.warning("no figures are drawn: %s", error)
        return []
    metrics = JSONLines(folder / METRICS_FILE).read()
    # A comparison has its runs in runs/<condition>/seed_<seed>.
    place = folder.resolve()
    name = place.parent.name if place.parent.parent.name == "runs" else place.name
    target = folder / FIGURES_FOLDER
    target.mkdir(exist_ok=True)
    drawn = []
    curves = {name: [metrics]}
    if logged_curves(curves, ["vqa_cross_entropy", "vqa_accuracy"]):
        plot_vqa_over_seeds(curves, target / "vqa.png")
        drawn.append(target / "vqa.png")
    if logged_curves(curves, ["flow_mse", "eval_flow_mse"]):
        plot_flow_over_seeds(curves, target / "flow.png")
        drawn.append(target / "flow.png")
    projections = folder / PROJECTION_FILE
    if projections.is_file() and (records := JSONLines(projections).read()):
        plot_projection(metrics, records, target / "projection.png")
        drawn.append(target / "projection.png")
    return drawn
