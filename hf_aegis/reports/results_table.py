"""
The results of a comparison as a table: one record per run, and mean and standard deviation over seeds per condition.

What is read is what `hf-aegis compare` leaves in its folder: `compare.json`, `pretrained.json`, `failures.json`,
`runs/<condition>/seed_<seed>/result.json`, and `libero.json` beside it where models were let act. A comparison that is
under way can be read as well.
"""

import csv
import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hf_aegis.atomic_files import write_text
from hf_aegis.format_version import FORMAT_KEY, written_version
from hf_aegis.functional.wilson import wilson_interval
from hf_aegis.machine_paths import without_machine_paths
from hf_aegis.reports.comparison_files import (
    read_failures,
    read_result,
    read_rollout_scores,
    read_scores,
    read_settings,
)


SETTINGS_FILE = "compare.json"
PRETRAINED_FILE = "pretrained.json"
FAILURES_FILE = "failures.json"
ROLLOUTS_FILE = "libero.json"
"""In a run's folder, what `hf-aegis eval-libero` wrote."""
RESULT_FILES = ("results.json", "results.csv", "results.md")

ROLLOUTS_NOTE = (
    "LIBERO success with its 95 % interval (Wilson) over the episodes of all seeds together, as if they were "
    "independent; episodes that crashed say nothing of the policy and are counted beside, those of all seeds together."
)

_ABOUT_THE_RUN = (FORMAT_KEY, "fingerprints", "versions")
_MISSING = "–"


@dataclass(frozen=True)
class Column:
    """
    A column of the table.

    Args:
        key (`str`): The measure.
        header (`str`): Its name and unit.
        format (`str`): Format of a number.
        scale (`float`, *optional*, defaults to `1`): What the measure is multiplied by.
        spread (`bool`, *optional*, defaults to `True`): Show the standard deviation as well.
        total (`bool`, *optional*, defaults to `False`): Show the sum over the runs in place of their mean.
    """

    key: str
    header: str
    format: str
    scale: float = 1
    spread: bool = True
    total: bool = False

    def cell(self, measure: Mapping[str, Any] | None, runs: int) -> str:
        """
        A mean or sum, with its interval, where there is one, or its standard deviation, where there are several
        values; says where some runs have none.
        """
        if not measure or not measure["n"]:
            return _MISSING
        value = measure["mean"] * (measure["n"] if self.total else 1)
        text = format(self.scale * value, self.format)
        if (interval := measure.get("interval")) is not None:
            text += f" [{', '.join(format(self.scale * bound, self.format) for bound in interval)}]"
        elif self.spread and measure["std"] is not None:
            text += f" ± {format(self.scale * measure['std'], self.format.replace('+', ''))}"
        return text if measure["n"] == runs else f"{text} ({measure['n']} of {runs})"


COLUMNS = (
    Column("vqa_cross_entropy", "VQA CE (nats/token)", ".4f"),
    Column("vqa_accuracy", "VQA accuracy (%)", ".1f", 100),
    Column("vqa_accuracy_change", "change (points)", "+.1f", 100),
    Column("vqa_any_match", "any-match (%)", ".1f", 100),
    Column("flow_mse", "held-out flow MSE", ".4f"),
    Column("flow_gap_share", "share of the gap (%)", ".0f", 100),
    Column("action_mse", "open-loop action MSE", ".4f"),
    Column("fast_action_mse", "FAST open-loop action MSE", ".4f"),
    Column("fast_decode_failures", "FAST chunks not decodable", ".0f"),
    Column("weight_share", "share of the update left (%)", ".0f", 100),
    Column("libero_success", "LIBERO success (%)", ".1f", 100),
    Column("libero_crashed", "LIBERO episodes crashed", ".0f", spread=False, total=True),
    Column("step_ms", "step (ms)", ".0f"),
    Column("step_processor_ms", "step, processor time (ms)", ".0f"),
    Column("peak_memory_mb", "peak memory (MB)", ".0f"),
    Column("trainable_parameters", "trainable parameters", ",.0f", spread=False),
    Column("throttle_rate", "throttle rate (%)", ".1f", 100),
    Column("energy_shed", "energy shed (%)", ".2f", 100),
    Column("certificate_logits", "logits' deviation (%)", ".2f", 100),
    Column("certificate_divergence", "divergence (nats/token)", ".4f"),
)


def collect_results(folder: Path) -> dict[str, Any]:
    """
    Everything that a comparison has measured so far.

    Returns:
        `dict`: `runs`, one flat record per finished run with `condition`, `seed` and every number of its `result.json`
        (`vqa_accuracy_by_type.color` for a nested one), and `vqa_accuracy_change` against the model before training;
        `conditions`, by name the number of finished `runs` and, in `measures`, `mean`, `std` (divisor n − 1; `None`
        for a single value) and `n` of each, and of `libero_success` the 95 % `interval` over the episodes of all runs;
        `before`, the scores of the model before training, or `None`; `failed`,
        the runs that ended with an error; and `date`, `command`, `machine`, `versions` and `settings`. Paths in texts
        say nothing about the machine.

    Raises:
        OSError: If the folder holds no comparison.
        ValueError: If a file is not what it should be, or has a newer format; file and key are named. If a run's final
            questions are not those that the model was asked before.
    """
    settings = read_settings(folder / SETTINGS_FILE)
    before = _before(folder / PRETRAINED_FILE)
    runs: list[dict[str, Any]] = []
    versions: list[dict[str, str]] = []
    for condition in settings["conditions"]:
        for seed in settings["seeds"]:
            path = folder / "runs" / condition / f"seed_{seed}" / "result.json"
            if not path.exists():
                continue
            result = read_result(path)
            _same_questions(result, before, path, folder / PRETRAINED_FILE)
            rollouts = _rollouts(path.with_name(ROLLOUTS_FILE))
            runs.append({"condition": condition, "seed": seed, **_numbers(result, before), **rollouts})
            if (found := result.get("versions")) is not None and found not in versions:
                versions.append(found)
    if gap := settings.get("gap"):
        _tell_gap_shares(runs, *gap)
    conditions = {}
    for condition in settings["conditions"]:
        own = [run for run in runs if run["condition"] == condition]
        keys = [key for key in _keys(own) if key != "energy_shed" or sheds_energy(settings["conditions"][condition])]
        measures = {key: _aggregate(run.get(key) for run in own) for key in keys}
        if "libero_success" in measures:
            measures["libero_success"]["interval"] = _pooled_interval(own)
        conditions[condition] = {"runs": len(own), "measures": measures}
    return {
        **written_version("comparison"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": without_machine_paths(settings.get("command")),
        "machine": settings.get("machine"),
        # One entry, unless packages changed between runs.
        "versions": versions,
        "before": before,
        "conditions": conditions,
        "runs": runs,
        "failed": without_machine_paths(read_failures(folder / FAILURES_FILE)),
        "settings": without_machine_paths(settings),
    }


def sheds_energy(recipe: Mapping[str, Any]) -> bool:
    """
    Whether a condition's combiner only takes from the task's gradient. The others, such as PCGrad, add the reference's
    gradient as well, so that the difference in energy says nothing of what was taken.
    """
    return recipe.get("combiner", "one_sided") == "one_sided"


def measured_columns(results: Mapping[str, Any], columns: Sequence[Column] = COLUMNS) -> list[Column]:
    """Those of `columns` that any condition, or the model before training, has."""
    keys = {key for condition in results["conditions"].values() for key in condition["measures"]}
    return [column for column in columns if column.key in keys | (results["before"] or {}).keys()]


def markdown_table(results: Mapping[str, Any]) -> str:
    """The aggregates as a Markdown table, one row per condition, and below it what to know when reading it."""
    planned = len(results["settings"]["seeds"])
    columns = measured_columns(results)
    rows = [["condition", "seeds", *(column.header for column in columns)]]
    if before := results["before"]:
        single = {key: {"mean": value, "std": None, "n": 1} for key, value in before.items() if key != "fingerprint"}
        rows.append(["before fine-tuning", _MISSING, *(column.cell(single.get(column.key), 1) for column in columns)])
    for name, condition in results["conditions"].items():
        runs = condition["runs"]
        cells = (column.cell(condition["measures"].get(column.key), runs) for column in columns)
        rows.append([name, str(runs) if runs == planned else f"{runs} of {planned}", *cells])
    rows.insert(1, ["---", *["---:"] * (len(rows[0]) - 1)])
    notes = [f"Mean ± standard deviation (n − 1) over seeds; {_MISSING}: not measured."]
    if gap := results["settings"].get("gap"):
        notes.append(f"Share of the gap: of that between {gap[0]} and {gap[1]} with the same seed, in flow MSE.")
    if (jobs := (results["machine"] or {}).get("jobs") or 1) > 1:
        notes.append(f"Step times were measured with {jobs} processes side by side.")
    if any("libero_success" in condition["measures"] for condition in results["conditions"].values()):
        notes.append(ROLLOUTS_NOTE)
    notes += [f"Failed: {run['condition']}, seed {run['seed']}: {run['error']}" for run in results["failed"]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n\n" + "\n\n".join(notes) + "\n"


def csv_table(results: Mapping[str, Any]) -> str:
    """One row per run; a measure that a run does not have is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ["condition", "seed", *_keys(results["runs"])], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(results["runs"])
    return text.getvalue()


def write_results(folder: Path) -> dict[str, Any]:
    """Writes `results.json`, `results.csv` and `results.md` into a comparison's folder, and returns the results."""
    results = collect_results(folder)
    texts = (json.dumps(results, indent=2, allow_nan=False), csv_table(results), markdown_table(results))
    for name, text in zip(RESULT_FILES, texts, strict=True):
        write_text(folder / name, text)
    return results


def pretrained_scores(path: Path) -> dict[str, Any]:
    """The output of `hf-aegis eval-vqa` under the names that a run's `result.json` has."""
    scores = read_scores(path)
    found = {
        "vqa_cross_entropy": scores["cross_entropy"],
        "vqa_accuracy": scores["accuracy"],
        "vqa_any_match": scores.get("any_match"),
        "vqa_accuracy_by_type": _accuracies(scores["by_type"]),
        "vqa_accuracy_by_answer_type": _accuracies(scores.get("by_answer_type") or {}),
    }
    return {key: value for key, value in found.items() if value not in (None, {})}


def _accuracies(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    return {name: score["accuracy"] for name, score in scores.items()}


def _before(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    return {**_flat(pretrained_scores(path)), "fingerprint": read_scores(path).get("fingerprint")}


def _same_questions(result: Mapping[str, Any], before: Mapping[str, Any] | None, path: Path, asked: Path) -> None:
    after = (result.get("fingerprints") or {}).get("vqa_final")
    if before is not None and after is not None and after != before["fingerprint"]:
        raise ValueError(
            f"{path}: key 'fingerprints.vqa_final' is {after}, but key 'fingerprint' of {asked} is "
            f"{before['fingerprint']}: other questions were asked before than after. Delete {asked.parent} to "
            "start anew"
        )


def _numbers(result: Mapping[str, Any], before: Mapping[str, Any] | None) -> dict[str, float | None]:
    """The numbers of a result, flat. `None` stands for one that was not finite."""
    flat = _flat({key: value for key, value in result.items() if key not in _ABOUT_THE_RUN})
    numbers = {key: value for key, value in flat.items() if value is None or type(value) in (int, float)}
    if before is not None and numbers.get("vqa_accuracy") is not None:
        numbers["vqa_accuracy_change"] = numbers["vqa_accuracy"] - before["vqa_accuracy"]
    return numbers


def _rollouts(path: Path) -> dict[str, float | None]:
    """How often the trained model succeeded, in total and by suite, and of how many episodes."""
    if not path.exists():
        return {}
    scores = read_rollout_scores(path)
    suites = scores["by_suite"] if len(scores["by_suite"]) > 1 else {}
    return {
        "libero_success": scores.get("success_rate"),
        **{f"libero_success.{name}": score.get("success_rate") for name, score in suites.items()},
        "libero_successes": scores["successes"],
        "libero_episodes": scores["episodes"],
        "libero_crashed": scores["crashed"],
    }


def _pooled_interval(runs: Iterable[Mapping[str, Any]]) -> list[float] | None:
    measured = [run for run in runs if run.get("libero_episodes")]
    trials = sum(run["libero_episodes"] for run in measured)
    return list(wilson_interval(sum(run["libero_successes"] for run in measured), trials)) if trials else None


def _tell_gap_shares(runs: Sequence[dict[str, Any]], low: str, high: str) -> None:
    """Adds to each run how much of the way from one condition's flow loss to another's, with its seed, it has gone."""
    flow = {(run["condition"], run["seed"]): run.get("flow_mse") for run in runs}
    for run in runs:
        start, end = flow.get((low, run["seed"])), flow.get((high, run["seed"]))
        if start is not None and end is not None and start != end and run.get("flow_mse") is not None:
            run["flow_gap_share"] = (start - run["flow_mse"]) / (start - end)


def _flat(measures: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in measures.items():
        flat |= {f"{key}.{name}": v for name, v in value.items()} if isinstance(value, Mapping) else {key: value}
    return flat


def _keys(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The measures of all runs, in the order in which they first appear."""
    return [key for key in dict.fromkeys(key for run in runs for key in run) if key not in ("condition", "seed")]


def _aggregate(values: Iterable[float | None]) -> dict[str, Any]:
    found = [value for value in values if value is not None]
    return {
        "mean": statistics.fmean(found) if found else None,
        "std": statistics.stdev(found) if len(found) > 1 else None,
        "n": len(found),
    }
