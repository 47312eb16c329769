"""Readers of files refuse what is damaged with their own errors, in bounded memory and time."""

from pathlib import Path

import pytest
from file_readers import READERS


FINDINGS = Path(__file__).parent / "findings"
# The first has the most to load; the second takes the longest for each.
FEW = {"demonstrations": 40, "fast_configuration": 40, "fast_vocabulary": 40, "recording_recipe": 40}


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_refused_by_name(name: str, tmp_path: Path) -> None:
    report = READERS[name](tmp_path).fuzz(FEW.get(name, 100))
    report.check()
    assert report.outcomes.keys() != {None}, "none was refused"


@pytest.mark.parametrize("name", READERS)
def test_files_that_were_once_read_wrongly_are_refused(name: str, tmp_path: Path) -> None:
    reader = READERS[name](tmp_path)
    reader.replay(FINDINGS / name).check()


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_ten_thousand_damaged_files_are_refused_by_name(name: str, tmp_path: Path) -> None:
    report = READERS[name](tmp_path).fuzz(10_000, seed=1)
    outcomes = ", ".join(f"{outcome or 'read'} {count}" for outcome, count in report.outcomes.most_common())
    print(f"\n{name}: {report.inputs} files; {outcomes}; {report.new_lines} lines reached, {report.kept} files kept")
    report.check()
