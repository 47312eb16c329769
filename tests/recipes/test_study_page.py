"""The page of the studies quotes the results that are kept beside it."""

import importlib
from pathlib import Path

import pytest

from hf_aegis.reports.results_table import collect_results, markdown_table


RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def study_page():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(RECIPES)
        yield importlib.import_module("study_page")


@pytest.fixture
def results(study_page, tmp_path, monkeypatch):
    """A folder of results in the place of the recipes', with three conditions."""
    rows = [
        "| condition | seeds | loss | step, ms |",
        "| --- | ---: | ---: | ---: |",
        "| before fine-tuning | – | 1 | – |",
    ]
    rows += ["| naive | 5 | 2 | 7 |", "| aegis | 1 of 5 | 3 | 8 |", "| lora | 0 of 5 | – | – |"]
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "results.md").write_text("\n".join(rows) + "\n\nNotes.\n")
    monkeypatch.setattr(study_page, "RECIPES", tmp_path)


def test_the_page_quotes_the_kept_results(study_page):
    page = study_page.PAGE.read_text()
    assert study_page.with_tables(page) == page, "python recipes/study_page.py writes the tables anew"


@pytest.mark.parametrize("results", ["study_embedded", "why_embedded"])
def test_every_condition_that_ran_is_on_the_page(study_page, results):
    page = study_page.PAGE.read_text()
    for name, condition in collect_results(RECIPES / "results" / results)["conditions"].items():
        assert not condition["runs"] or f"\n| {name} | " in page, name


@pytest.mark.usefixtures("results")
def test_tables_are_written_in_place_of_older_ones(study_page):
    page = "Before.\n<!-- table: results, conditions{}: loss -->\n\n| old |\n\nAfter.\n\n| another | table |\n"
    head = "| condition | seeds | loss |\n| --- | ---: | ---: |\n| before fine-tuning | – | 1 |\n"
    for chosen, rows in {
        "": "| naive | 5 | 2 |\n| aegis | 1 of 5 | 3 |\n",
        " with at least 5 seeds": "| naive | 5 | 2 |\n",
        " with fewer than 5 seeds": "| aegis | 1 of 5 | 3 |\n",
    }.items():
        written = study_page.with_tables(page.format(chosen))
        assert written == page.format(chosen).replace("| old |\n", head + rows)
        assert study_page.with_tables(written) == written


@pytest.mark.usefixtures("results")
def test_columns_that_are_not_there_are_named(study_page):
    with pytest.raises(ValueError, match=r"results\.md has no columns \['memory'\]"):
        study_page.with_tables("<!-- table: results, conditions: step, ms; memory -->\n\n")


@pytest.mark.parametrize("results", ["study_embedded", "why_embedded", "compare_acting"])
def test_kept_results_say_what_they_are_of(results):
    kept = collect_results(RECIPES / "results" / results)
    assert kept["versions"] and kept["machine"]["cores"] == 2
    assert all({"flow_mse", "vqa_cross_entropy", "vqa_accuracy"} <= run.keys() for run in kept["runs"])
    assert (RECIPES / "results" / results / "results.md").read_text() == markdown_table(kept)
