"""The card of a comparison's results, which are a data set: a row for each run."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData

from hf_aegis.atomic_files import write_text
from hf_aegis.hub import is_repo_id, render_card
from hf_aegis.publishing import CARD_FILE
from hf_aegis.publishing.papers import bibliography
from hf_aegis.publishing.policy_card import told_model, told_questions
from hf_aegis.publishing.run_record import RunRecord
from hf_aegis.reports.comparison_report import FIGURES_FOLDER, REPORT_FILE, write_report
from hf_aegis.reports.results_table import RESULT_FILES, markdown_table, write_results
from hf_aegis.reports.style import condition_styles


TEMPLATE = "results.md"
PUSHED_FILES = (CARD_FILE, *RESULT_FILES, REPORT_FILE, f"{FIGURES_FOLDER}/*.png")
"""What of a comparison's folder its repository has; models and anchors are repositories of their own."""


def write_results_card(folder: Path, repo_id: str | None = None) -> Path:
    """
    Writes the card of a comparison's results into its folder, and before it the results anew, and the report with its
    figures where there is none.

    Args:
        folder (`Path`): The output folder of `hf-aegis compare` or `hf-aegis demo`.
        repo_id (`str`, *optional*): Where the results are on the Hub, or will be; by default the card speaks of the
            folder.

    Returns:
        `Path`: the card.

    Raises:
        ValueError: If the folder holds no comparison with a finished run.
        ImportError: If matplotlib is not installed, and figures have to be drawn.
    """
    if not (folder / REPORT_FILE).is_file():
        write_report(folder)
    results = write_results(folder)
    write_text(folder / CARD_FILE, results_card(folder, results, repo_id))
    return folder / CARD_FILE


def results_card(folder: Path, results: Mapping[str, Any], repo_id: str | None = None) -> str:
    """The card's text; see [`write_results_card`]."""
    name = (repo_id or folder.resolve().name).split("/")[-1]
    settings = results["settings"]
    records = {condition: RunRecord(folder, {**own}) for condition, own in settings["conditions"].items()}
    looks = condition_styles(records)
    conditions = [(key, looks[key]["label"], record.method) for key, record in records.items()]
    papers = itertools.chain.from_iterable(method.papers for _, _, method in conditions if method)
    shared = next(iter(settings["conditions"].values()))
    models = {own.get("model") for own in settings["conditions"].values()}
    data = DatasetCardData(
        pretty_name=name,
        tags=["hf-aegis", "robotics", "vision-language-action", "catastrophic-forgetting"],
        size_categories=["n<1K"],
        configs=[{"config_name": "default", "data_files": [{"split": "runs", "path": RESULT_FILES[1]}]}],
    )
    return render_card(
        TEMPLATE,
        data,
        name=name,
        source=repo_id or name,
        date=results["date"][:10],
        table=markdown_table(results),
        conditions=conditions,
        seeds=settings["seeds"],
        runs=len(results["runs"]),
        models=[told_model(model) for model in sorted(m for m in models if is_repo_id(m))],
        embedded=None in models,
        questions=told_questions(shared),
        figures=[path.relative_to(folder).as_posix() for path in sorted(folder.glob(PUSHED_FILES[-1]))],
        command=results["command"],
        machine=results["machine"] or {},
        versions=results["versions"],
        bibliography=bibliography(papers),
    )
