import importlib
import json
from pathlib import Path

import pytest

from hf_aegis.reports.results_table import collect_results


@pytest.fixture(scope="module")
def keep():
    """Recipes are scripts, not a package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "recipes")
        yield importlib.import_module("keep_results").keep


@pytest.fixture
def comparison(tmp_path):
    folder = tmp_path / "machine" / "study"
    settings = {"machine": {"jobs": 1}, "seeds": [0, 1], "conditions": {"naive": {"preserve": "none"}, "held": {}}}
    files = {
        "compare.json": json.dumps(settings),
        "failures.json": "[]",
        "anchors/questions.yaml": f"output_dir: {folder}/anchors/questions\n",
        "anchors/questions/recipe.yaml": "num_samples: 3\n",
        "runs/naive/seed_0.yaml": f"output_dir: {folder}/runs/naive/seed_0\n",
        "runs/naive/seed_0/recipe.yaml": f"output_dir: {folder}/runs/naive/seed_0\nmodel: {tmp_path}/models/vlm\n",
        "runs/naive/seed_0/result.json": json.dumps({"flow_mse": 0.25}),
        "runs/naive/seed_0/metrics.jsonl": '{"step": 1, "loss": 2.0}\n',
        "runs/naive/seed_0/model.safetensors": "weights",
        "runs/naive/seed_0/checkpoint-4/optimizer.pt": "state",
        "runs/held/seed_0/metrics.jsonl": '{"step": 1, "loss": 2.0}\n',
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_a_copy_has_the_results_and_no_weights_and_no_unfinished_run(keep, comparison, tmp_path):
    kept = tmp_path / "results" / "study"
    assert keep(comparison, kept) == 1
    names = {str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file()}
    assert names == {
        *("compare.json", "failures.json", "results.json", "results.csv", "results.md"),
        *("anchors/questions.yaml", "runs/naive/seed_0.yaml"),
        *(f"runs/naive/seed_0/{name}" for name in ("recipe.yaml", "result.json", "metrics.jsonl")),
    }
    assert collect_results(kept)["runs"] == collect_results(comparison)["runs"]


def test_a_copy_names_no_path_of_the_machine_and_continues_where_recipes_write(keep, comparison, tmp_path):
    kept = tmp_path / "results" / "study"
    keep(comparison, kept)
    assert not any(str(tmp_path) in path.read_text() for path in kept.rglob("*") if path.is_file())
    assert (kept / "runs/naive/seed_0/recipe.yaml").read_text() == (
        "output_dir: outputs/study/runs/naive/seed_0\nmodel: vlm\n"
    )


def test_an_older_copy_is_replaced_and_another_folder_is_not(keep, comparison, tmp_path):
    kept = tmp_path / "study"
    keep(comparison, kept)
    (kept / "old").write_text("of an older copy")
    keep(comparison, kept)
    assert not (kept / "old").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine").write_text("mine")
    with pytest.raises(ValueError, match=r"other is no copy of a comparison \(it has no compare.json\)"):
        keep(comparison, other)
    assert (other / "mine").read_text() == "mine"
