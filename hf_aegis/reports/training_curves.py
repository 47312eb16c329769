"""Curves of training runs: VQA loss, flow loss, and what the projection did (arXiv 2604.16067, figures 3 to 5)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_aegis.reports.style import CONDITION_STYLES, figure_style


Records = Sequence[Mapping[str, Any]]


def series(records: Records, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the records that have `key`."""
    pairs = [(record["step"], record[key]) for record in records if key in record]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.asarray(steps), np.asarray(values, dtype=float)


def plot_vqa(runs: Mapping[str, Records], path: Path) -> None:
    """VQA cross-entropy and accuracy on the hold-out over training steps, one line per condition."""
    with figure_style() as pyplot:
        figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4))
        for name, records in runs.items():
            style = CONDITION_STYLES[name]
            axes[0].plot(*series(records, "vqa_cross_entropy"), **style)
            steps, accuracy = series(records, "vqa_accuracy")
            axes[1].plot(steps, 100 * accuracy, **style)
        for axis, records_key, scale in ((axes[0], "vqa_cross_entropy", 1), (axes[1], "vqa_accuracy", 100)):
            _, first = series(next(iter(runs.values())), records_key)
            axis.axhline(scale * first[0], **CONDITION_STYLES["pretrained"])
            axis.set_xlabel("training step")
        axes[0].set_ylabel("VQA cross-entropy (nats/token)")
        axes[1].set_ylabel("VQA accuracy (%)")
        axes[0].set_ylim(bottom=0)
        axes[0].legend()
        figure.savefig(path)
        pyplot.close(figure)


def plot_flow(runs: Mapping[str, Records], loss_scale: float, path: Path) -> None:
    """Flow-matching loss on training batches (faint) and on held-out demonstrations (marked) over training steps."""
    with figure_style() as pyplot:
        figure, axis = pyplot.subplots(figsize=(6, 3.6))
        for name, records in runs.items():
            style = CONDITION_STYLES[name]
            steps, loss = series(records, "loss")
            axis.plot(steps, loss / loss_scale, **{**style, "alpha": 0.35, "label": f"{style['label']}, training"})
            steps, held_out = series(records, "eval_loss")
            axis.plot(steps, held_out / loss_scale, **{**style, "marker": "o", "label": f"{style['label']}, held out"})
        axis.set_xlabel("training step")
        axis.set_ylabel("flow-matching MSE")
        axis.set_ylim(bottom=0)
        axis.legend(ncols=2, fontsize=9)
        figure.savefig(path)
        pyplot.close(figure)


def plot_projection(metrics: Records, projection: Records, path: Path) -> None:
    """Throttle rate, energy shed, cosine and penalty over training steps, and a map of conflicts by layer and step."""
    groups = sorted({group for record in projection for group in record["groups"]}, key=_layer_order)
    last = max(record["step"] for record in projection)
    cosines = np.full((len(groups), last), np.nan)
    for record in projection:
        for group, cosine in zip(record["groups"], record["cosine"], strict=True):
            cosines[groups.index(group), record["step"] - 1] = cosine
    panels = (
        ("throttle_rate", 100, "groups in\nconflict (%)"),
        ("energy_shed", 100, "gradient energy\nshed (%)"),
        ("cosine", 1, "cosine of task and\nanchor gradient"),
        ("penalty", 1, "transport\npenalty"),
    )
    with figure_style() as pyplot:
        figure = pyplot.figure(figsize=(9, 7.2))
        grid = figure.add_gridspec(3, 2, height_ratios=(1, 1, 1.15))
        for index, (key, scale, label) in enumerate(panels):
            axis = figure.add_subplot(grid[index // 2, index % 2])
            steps, values = series(metrics, key)
            axis.plot(steps, scale * values, color=CONDITION_STYLES["aegis"]["color"])
            axis.set_ylabel(label)
            axis.set_xlabel("training step")
            if key == "cosine":
                axis.axhline(0, color="black", linewidth=0.8)
            else:
                axis.set_ylim(bottom=0)
        axis = figure.add_subplot(grid[2, :])
        limit = float(np.nanquantile(np.abs(cosines), 0.98)) or 1.0
        image = axis.imshow(
            cosines,
            aspect="auto",
            cmap="PuOr",
            vmin=-limit,
            vmax=limit,
            interpolation="nearest",
            extent=(0.5, last + 0.5, len(groups) - 0.5, -0.5),
        )
        axis.set_yticks(range(len(groups)), [_label(group) for group in groups], fontsize=9)
        axis.set_xlabel("training step")
        axis.grid(False)
        figure.colorbar(image, ax=axis, label="cosine (negative: conflict)")
        figure.savefig(path)
        pyplot.close(figure)


def _layer_order(group: str) -> tuple[bool, int, str]:
    number = group.rpartition(".")[2]
    return (not number.isdigit(), int(number) if number.isdigit() else 0, group)


def _label(group: str) -> str:
    return group.replace("layers.", "layer ").replace("multi_modal_", "").replace("_", " ")
