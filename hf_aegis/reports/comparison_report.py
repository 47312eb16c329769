"""The report of a comparison: its tables and figures on one page that is readable on its own."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_aegis.atomic_files import write_text
from hf_aegis.reports import html_page as html
from hf_aegis.reports.comparison_figures import Figure, draw_figures
from hf_aegis.reports.diagnostics_table import PAPER_ROW, diagnostics_rows
from hf_aegis.reports.figure_material import Material
from hf_aegis.reports.results_table import (
    COLUMNS,
    ROLLOUTS_NOTE,
    SETTINGS_FILE,
    Column,
    collect_results,
    measured_columns,
    sheds_energy,
)
from hf_aegis.reports.run_logs import RunLogs, runs_by_condition
from hf_aegis.reports.style import condition_order, condition_styles


REPORT_FILE = "report.html"
FIGURES_FOLDER = "figures"

# Of questions that have both, such as VQAv2's with its 65 types of question, the types of answer are the ones told.
_BY_TYPE = ("vqa_accuracy_by_answer_type.", "vqa_accuracy_by_type.")
_COST = ("step_ms", "step_processor_ms", "peak_memory_mb", "trainable_parameters")
_ANSWERS = ("vqa_cross_entropy", "vqa_accuracy", "vqa_accuracy_change", "vqa_any_match")
_ACTIONS = ("flow_mse", "flow_gap_share", "action_mse")
_CLOSED_LOOP = ("libero_success", "libero_crashed")
_FAST = ("fast_action_mse", "fast_decode_failures")
_MEANINGS = {
    "vqa_accuracy_change": "the change of the accuracy against the model before fine-tuning",
    "vqa_any_match": "the share of answers that any annotator gave",
    "flow_mse": "mean squared error of the velocity on held-out demonstrations",
    "flow_gap_share": "how much of the gap between the flow MSE of the settings' two conditions is closed",
    "action_mse": "mean squared error of sampled action chunks there, in squared normalised units",
}


def write_report(folder: Path) -> Path:
    """
    Writes the report of a comparison from what its runs have logged, and nothing else: figures as PNG files in
    `figures/`, and `report.html`, which embeds them and loads nothing.

    What was not logged is left out, with a sentence that says so. Runs that are not finished are left out as well.

    Args:
        folder (`Path`): The output folder of `hf-aegis compare`.

    Returns:
        `Path`: the page.

    Raises:
        ValueError: If the folder holds no comparison or no finished run, or a file in it is not what it should be.
        ImportError: If matplotlib is not installed; it comes with the extra `demo`.
    """
    if not (folder / SETTINGS_FILE).is_file():
        raise ValueError(f"{folder} holds no {SETTINGS_FILE}; expected the output folder of `hf-aegis compare`")
    results = collect_results(folder)
    if not results["runs"]:
        raise ValueError(f"{folder} holds no finished run (runs/<condition>/seed_<seed>/result.json)")
    logs = runs_by_condition(folder, results["runs"])
    figures = draw_figures(Material(results, logs), folder / FIGURES_FOLDER)
    path = folder / REPORT_FILE
    write_text(path, html.page(f"Comparison: {folder.resolve().name}", _blocks(results, logs, figures)))
    return path


def _blocks(results: Mapping[str, Any], logs: Mapping[str, list[RunLogs]], figures: Sequence[Figure]) -> list[str]:
    drawn = [figure for figure in figures if figure.path is not None]
    projections = _projections(results, logs)
    sections = [("results", "Results"), *((figure.name, figure.title) for figure in drawn)]
    sections += [("diagnostics", "Diagnostics of the projection")] if projections else []
    sections += [("settings", "Settings and versions")]
    blocks = [*_what_was_run(results, logs), html.contents(sections), *_results(results, logs)]
    for figure in drawn:
        assert figure.path is not None
        blocks += [
            html.heading(figure.title, anchor=figure.name),
            html.image(figure.path, figure.title),
            html.paragraph(figure.explanation),
        ]
    if projections:
        blocks += _diagnostics(projections)
    missing = [f"{figure.title}: {figure.missing}" for figure in figures if figure.path is None]
    if missing:
        blocks += [
            html.heading("What is missing"),
            html.paragraph("These figures need data that the runs have not logged:"),
            html.bullets(missing),
        ]
    return [*blocks, *_settings(results)]


def _what_was_run(results: Mapping[str, Any], logs: Mapping[str, list[RunLogs]]) -> list[str]:
    settings = results["settings"]
    seeds = settings["seeds"]
    labels = _labels(logs)
    model = next(iter(settings["conditions"].values())).get("model") or "embedded"
    facts = [
        f"Model: {model}.",
        f"{len(results['runs'])} finished training runs of {len(logs)} conditions: {'; '.join(labels.values())}.",
        f"Seeds: {', '.join(map(str, seeds))}. With each seed all conditions have one start and see the same batches.",
    ]
    if before := results["before"]:
        facts.append(
            f"Before fine-tuning the model answers {100 * before['vqa_accuracy']:.1f} % of the final questions "
            f"correctly, at a cross-entropy of {before['vqa_cross_entropy']:.3f} nats per token."
        )
    unfinished = {
        name: [str(seed) for seed in seeds if seed not in {run.seed for run in logs.get(name, ())}]
        for name in settings["conditions"]
    }
    if told := [f"{name}, seed {', '.join(missing)}" for name, missing in unfinished.items() if missing]:
        facts.append(f"Not finished, and left out everywhere: {'; '.join(told)}.")
    facts += [f"Failed: {run['condition']}, seed {run['seed']}: {run['error']}" for run in results["failed"]]
    for kind, what in (("train", "training data"), ("held_out", "held-out demonstrations"), ("vqa", "questions")):
        found = {run.fingerprints().get(kind) for runs in logs.values() for run in runs} - {None}
        if len(found) > 1:
            facts.append(
                f"Careful: the runs do not share their {what} ({len(found)} different fingerprints), so what was "
                f"measured on them cannot be compared between all conditions."
            )
    date = f"Written {results['date']}" + (f" after: {results['command']}" if results["command"] else "")
    return [
        html.paragraph(
            "A vision-language model was fine-tuned into a robot policy in several ways. This page compares how much "
            "of its question answering each way keeps, and how well each learns to act."
        ),
        html.bullets(facts),
        html.paragraph(date, faint=True),
    ]


def _results(results: Mapping[str, Any], logs: Mapping[str, list[RunLogs]]) -> list[str]:
    by_key = {column.key: column for column in COLUMNS}
    answers, actions, fast, cost = (
        measured_columns(results, [by_key[key] for key in keys]) for keys in (_ANSWERS, _ACTIONS, _FAST, _COST)
    )
    meanings = [_MEANINGS[column.key] for column in (*answers, *actions) if column.key in _MEANINGS]
    blocks = [
        html.heading("Results", anchor="results"),
        html.table(*_table(results, logs, [*answers, *actions])),
        html.paragraph(
            f"After training: cross-entropy (CE) and accuracy on the final questions; {'; '.join(meanings)}. Mean ± "
            "standard deviation (n − 1) over seeds; a single seed has none. –: not measured."
        ),
    ]
    if of_types := _by_type(results):
        blocks += [
            html.heading("Accuracy by type of question or answer", level=3),
            html.table(*_table(results, logs, of_types)),
        ]
    if closed_loop := measured_columns(results, [by_key[key] for key in _CLOSED_LOOP]):
        blocks += [
            html.heading("Acting in the LIBERO simulator", level=3),
            html.table(*_table(results, logs, closed_loop, before=False)),
            html.paragraph(f"{ROLLOUTS_NOTE} {_rollout_settings(results)}"),
        ]
    if fast:
        generating = {
            name: runs for name, runs in logs.items() if results["conditions"][name]["measures"].keys() & _FAST
        }
        blocks += [
            html.heading("Actions of the FAST head", level=3),
            html.table(*_table(results, generating, fast, before=False)),
            html.paragraph(
                "The same open-loop error, of the chunks that the discrete head generates as tokens, and how many of "
                "these did not decode to a whole chunk; those have no error."
            ),
        ]
    if cost:
        jobs = (results["machine"] or {}).get("jobs") or 1
        beside = f" Steps were timed with {jobs} processes side by side on one machine." if jobs > 1 else ""
        blocks += [
            html.heading("Cost", level=3),
            html.table(*_table(results, logs, cost, before=False)),
            html.paragraph(
                "Median time of a training step, and that of its threads together; peak memory, and parameters that "
                f"train.{beside}"
            ),
        ]
    return blocks


def _rollout_settings(results: Mapping[str, Any]) -> str:
    asked = results["settings"].get("libero") or {}
    return "Asked for: " + "; ".join(f"{name} {value}" for name, value in asked.items()) + "."


def _by_type(results: Mapping[str, Any]) -> list[Column]:
    """Columns of the accuracy by type of answer, or else of question."""
    known = {key for condition in results["conditions"].values() for key in condition["measures"]}
    known |= (results["before"] or {}).keys()
    for prefix in _BY_TYPE:
        if found := sorted(key for key in known if key.startswith(prefix)):
            return [Column(key, f"{key.removeprefix(prefix)} (%)", ".1f", 100) for key in found]
    return []


def _table(
    results: Mapping[str, Any], logs: Mapping[str, list[RunLogs]], columns: Sequence[Column], before: bool = True
) -> tuple[list[str], list[list[str]]]:
    rows = []
    if before and results["before"]:
        alone = {key: {"mean": value, "std": None, "n": 1} for key, value in results["before"].items()}
        rows.append(["before fine-tuning", "–", *(column.cell(alone.get(column.key), 1) for column in columns)])
    for name, label in _labels(logs).items():
        condition = results["conditions"][name]
        cells = (column.cell(condition["measures"].get(column.key), condition["runs"]) for column in columns)
        rows.append([label, str(condition["runs"]), *cells])
    return ["condition", "seeds", *(column.header for column in columns)], rows


def _projections(results: Mapping[str, Any], logs: Mapping[str, list[RunLogs]]) -> dict[str, list[Any]]:
    """By label of the condition, the figures of each run's projected backward passes."""
    found: dict[str, list[Any]] = {}
    for name, label in _labels(logs).items():
        left_out = () if sheds_energy(results["settings"]["conditions"][name]) else ("energy_shed",)
        for run in logs[name]:
            records = [record["summary"] for record in run.projection() or () if record.get("summary")]
            if records:
                kept = [{key: value for key, value in one.items() if key not in left_out} for one in records]
                found.setdefault(label, []).append(kept)
    return found


def _diagnostics(projections: Mapping[str, Sequence[Any]]) -> list[str]:
    return [
        html.heading("Diagnostics of the projection", anchor="diagnostics"),
        html.table(*diagnostics_rows(projections)),
        html.paragraph(
            "Mean (minimum to maximum) over all training steps and seeds of the figures of each projected backward "
            "pass. Energy is told of projections only: of combinations that add the reference's gradient it would say "
            "nothing. Cosine and coefficient are means over groups; the coefficient α is zero without conflict and "
            "negative with it. The norm is that of the vision-language model's gradient before projection. The last "
            f"row, “{PAPER_ROW}”, is another model, data set and scale: it helps to see whether a figure is of a "
            "plausible size, not whether it is right."
        ),
    ]


def _settings(results: Mapping[str, Any]) -> list[str]:
    versions = results["versions"]
    names = sorted({name for found in versions for name in found})
    rows = [[name, *(found.get(name, "–") for found in versions)] for name in names]
    several = [f"set {index + 1}" for index in range(len(versions))] if len(versions) > 1 else ["version"]
    blocks = [html.heading("Settings and versions", anchor="settings")]
    if versions:
        blocks.append(html.table(["package", *several], rows))
    if len(versions) > 1:
        blocks.append(html.paragraph("Packages changed between runs; each set is that of some of them."))
    if machine := results["machine"]:
        blocks.append(
            html.paragraph("Machine: " + ", ".join(f"{value} {key}" for key, value in machine.items()) + ".")
        )
    return [*blocks, html.preformatted(SETTINGS_FILE, json.dumps(results["settings"], indent=2, ensure_ascii=False))]


def _labels(logs: Mapping[str, list[RunLogs]]) -> dict[str, str]:
    names = condition_order(logs)
    return {name: style["label"] for name, style in condition_styles(names).items()}
