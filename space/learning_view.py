"""How the models' answers went while they learned to act, from what the runs logged themselves."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from figures import Line, chart, legend
from settings import ShownModel

from hf_aegis.hub import HubDownloadError, download_files


_METRICS, _EVALUATION = "metrics.jsonl", "evaluation.json"
_CURVES = (
    ("vqa_cross_entropy", "Loss on questions (nats per token)", 1.0),
    ("vqa_accuracy", "Right answers (%)", 100.0),
    ("eval_flow_mse", "Error of the actions (flow MSE, held-out)", 1.0),
)


def learning_page(models: Sequence[ShownModel]) -> str:
    """Curves of those models that bring the log of their training along, and a table of where they ended."""
    logs = {shown: _read_lines(shown) for shown in models if shown.acts}
    logs = {shown: records for shown, records in logs.items() if records}
    if not logs:
        return '<p class="note">None of the models brings <code>metrics.jsonl</code>, the log of its training.</p>'
    charts = "".join(_chart(logs, *curve) for curve in _CURVES)
    missing = [shown.label for shown in models if shown.acts and shown not in logs]
    note = f'<p class="note">Without a log of their training: {escape(", ".join(missing))}.</p>' if missing else ""
    entries = [(shown.key, shown.label) for shown in logs]
    return f'{legend(entries)}<div class="charts">{charts}</div>{note}{_table(list(logs))}'


def _chart(logs: dict[ShownModel, list[dict[str, Any]]], key: str, title: str, scale: float) -> str:
    lines = []
    for shown, records in logs.items():
        points = [(record["step"], scale * record[key]) for record in records if record.get(key) is not None]
        if len(points) > 1:
            lines.append(Line(shown.key, shown.label, *zip(*points, strict=True)))
    if not lines:
        return ""
    course = "; ".join(f"{line.label} from {line.y[0]:.3g} to {line.y[-1]:.3g}" for line in lines)
    limits = (0.0, 100.0) if scale == 100 else (0.0, max(max(line.y) for line in lines))
    return chart(lines, title, "training step", f"{title} over training steps: {course}.", limits)


def _table(models: Sequence[ShownModel]) -> str:
    rows = ""
    before = None
    for shown in models:
        scores = _read_scores(shown)
        if scores is None:
            continue
        before = scores["vqa_before"]
        rows += _row(shown.label, scores["vqa"], f"{scores['flow_mse']:.3f}")
    if before is None:
        return ""
    head = "".join(f'<th scope="col">{name}</th>' for name in ("", "Right answers", "Loss on questions", "Flow MSE"))
    return (
        f'<table class="scores"><caption>Where they ended: {before["count"]:,} questions of easy-VQA’s test split, '
        f"which no training saw</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{_row('Before', before, '–')}{rows}</tbody></table>"
    )


def _row(label: str, vqa: dict[str, Any], flow: str) -> str:
    cells = (f"{100 * vqa['accuracy']:.1f} %", f"{vqa['cross_entropy']:.3f}", flow)
    return f'<tr><th scope="row">{escape(label)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _read_lines(shown: ShownModel) -> list[dict[str, Any]]:
    file = _find(shown, _METRICS)
    return [] if file is None else [json.loads(line) for line in file.read_text().splitlines()]


def _read_scores(shown: ShownModel) -> dict[str, Any] | None:
    file = _find(shown, _EVALUATION)
    scores = {} if file is None else json.loads(file.read_text())
    # Others have files of this name too.
    return scores if {"vqa", "vqa_before", "flow_mse"} <= scores.keys() else None


def _find(shown: ShownModel, name: str) -> Path | None:
    """A file beside a model's weights, in its folder or on the Hub; `None` where there is none."""
    if Path(shown.source).is_dir():
        file = Path(shown.source, name)
        return file if file.is_file() else None
    try:
        return download_files(shown.source, [name])[0]
    except HubDownloadError:
        return None
