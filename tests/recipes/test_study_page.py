"""The pages of the studies quote the results that are kept beside them."""

from pathlib import Path

import pytest

from hf_aegis.reports.results_table import collect_results, markdown_table


RECIPES = Path(__file__).parents[2] / "recipes"


def tables(text):
    """Every Markdown table of a text: its rows by their first cell, each by its header."""
    found, lines = [], text.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("| condition |"):
            header = [cell.strip() for cell in line.strip("| ").split(" | ")]
            rows = {}
            for row in lines[number + 2 :]:
                if not row.startswith("|"):
                    break
                cells = [cell.strip() for cell in row.strip("| ").split(" | ")]
                rows[cells[0]] = dict(zip(header, cells, strict=True))
            found.append(rows)
    return found


@pytest.mark.parametrize("results", ["study_embedded", "why_embedded"])
def test_the_page_quotes_the_kept_results(results):
    folder = RECIPES / "results" / results
    (measured,) = tables(markdown_table(collect_results(folder)))
    ran = {name for name in measured if not measured[name]["seeds"].startswith("0 ")}
    quoted = [rows for rows in tables((RECIPES / "STUDY.md").read_text()) if rows.keys() == ran]
    assert len(quoted) == 1, "no table, or several, of just the conditions that ran"
    for name, row in quoted[0].items():
        assert row.items() <= measured[name].items(), name


@pytest.mark.parametrize("results", ["study_embedded", "why_embedded", "compare_acting"])
def test_kept_results_say_what_they_are_of(results):
    kept = collect_results(RECIPES / "results" / results)
    assert kept["versions"] and kept["machine"]["cores"] == 2
    assert all({"flow_mse", "vqa_cross_entropy", "vqa_accuracy"} <= run.keys() for run in kept["runs"])
    assert (RECIPES / "results" / results / "results.md").read_text() == markdown_table(kept)
