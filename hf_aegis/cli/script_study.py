"""What studies share that are scripts among the recipes: their command line, and what stands in their folder."""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from hf_aegis.atomic_files import write_text
from hf_aegis.cli.comparison import refuse_other_settings
from hf_aegis.reports.results_table import RESULT_FILES, SETTINGS_FILE, collect_results, csv_table


def study_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of the recipe, of another output folder than the recipe's, and of the conditions to run now."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="the recipe (YAML)")
    parser.add_argument("--output_dir", help="in the place of the recipe's")
    parser.add_argument("--only", nargs="+", metavar="CONDITION", help="the conditions to run now; default: all")
    return parser


def chosen_conditions(conditions: Iterable[str], only: Iterable[str] | None) -> list[str]:
    """
    The conditions that `only` names, in the study's own order; all by default.

    Raises:
        ValueError: If `only` names another one.
    """
    conditions = list(conditions)
    chosen = set(conditions if only is None else only)
    if unknown := sorted(chosen - set(conditions)):
        raise ValueError(f"only: unknown conditions {unknown}, expected some of {conditions}")
    return [name for name in conditions if name in chosen]


def settings_with_earlier(
    folder: Path, own: Mapping[str, Any], recipes: Mapping[str, Any], seeds: Iterable[int]
) -> dict[str, Any]:
    """
    The settings of a study and those that its folder has already, which must not be mixed with others; conditions and
    seeds may be added.

    Args:
        folder (`Path`): Of the study.
        own (`Mapping[str, Any]`): What has to stay as it is, by part; each part is a mapping.
        recipes (`Mapping[str, Any]`): Fields of each condition.
        seeds (`Iterable[int]`): That are run.

    Returns:
        `dict`: `seeds`, all parts of `own`, and `conditions`.

    Raises:
        ValueError: If a setting differs from that of what is there already.
    """
    path = folder / SETTINGS_FILE
    # Through JSON, so that what is compared with a file has the types that it has there.
    found = json.loads(json.dumps({"seeds": sorted(set(seeds)), **own, "conditions": dict(recipes)}))
    if not path.exists():
        return found
    earlier = json.loads(path.read_text())
    for part in own:
        refuse_other_settings(earlier[part], found[part], f"{folder} holds a study", "delete the folder")
    for name, recipe in found["conditions"].items():
        if (runs := folder / "runs" / name).exists():
            noted = earlier["conditions"].get(name, recipe)
            refuse_other_settings(noted, recipe, f"{runs} holds runs", "delete that folder")
    found["conditions"] = {**earlier["conditions"], **found["conditions"]}
    found["seeds"] = sorted({*earlier["seeds"], *found["seeds"]})
    return found


def write_study_results(folder: Path, table: Callable[[Mapping[str, Any]], str]) -> dict[str, Any]:
    """Writes `results.json`, `.csv` and `.md`, with `before.json` and a Markdown `table`; returns the results."""
    results = collect_results(folder)
    results["before"] = json.loads((folder / "before.json").read_text())
    texts = (json.dumps(results, indent=2, allow_nan=False), csv_table(results), table(results))
    for name, text in zip(RESULT_FILES, texts, strict=True):
        write_text(folder / name, text)
    return results
