"""Readers of files read what is damaged, or refuse it with their own errors, in bounded memory and time."""

from pathlib import Path

import pytest
from file_readers import READERS


FINDINGS = Path(__file__).parent / "findings"
# By reader, how many of its inputs are refused at least: two thirds of those that were when it was written. The inputs
# are seeded; a reader that reads what it does not understand falls below.
FLOORS = {
    "statistics": 63,
    "predictions": 54,
    "episodes": 56,
    "logs": 48,
    "vqa_folder": 58,
    "fast_configuration": 26,
    "fast_vocabulary": 26,
    "anchor_configuration": 64,
    "anchor_tensors": 63,
    "partial_collection": 62,
    "expert_average": 65,
    "checkpoint": 24,
    "training_recipe": 60,
    "comparison_recipe": 63,
    "recording_recipe": 22,
    "run_recipe": 37,
    "comparison_folder": 60,
    "demonstrations": 25,
}
# Those that load or take the most for each; all others get 100.
FEW = dict.fromkeys(("demonstrations", "fast_configuration", "fast_vocabulary", "recording_recipe", "checkpoint"), 40)


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused_by_name(name: str, tmp_path: Path) -> None:
    report = READERS[name](tmp_path).fuzz(FEW.get(name, 100))
    report.check()
    assert report.inputs - report.outcomes[None] >= FLOORS[name]


@pytest.mark.parametrize("name", READERS)
def test_files_that_were_once_read_wrongly_are_refused(name: str, tmp_path: Path) -> None:
    reader = READERS[name](tmp_path)
    reader.replay(FINDINGS / name).check()


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_ten_thousand_damaged_files_are_read_or_refused_by_name(name: str, tmp_path: Path) -> None:
    report = READERS[name](tmp_path).fuzz(10_000, seed=1)
    outcomes = ", ".join(f"{outcome or 'read'} {count}" for outcome, count in report.outcomes.most_common())
    print(f"\n{name}: {report.inputs} files; {outcomes}; {report.new_lines} lines reached, {report.kept} files kept")
    report.check()
