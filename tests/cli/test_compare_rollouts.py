"""A comparison whose trained models act: what is run for each, resuming, and the table. Stand-in commands."""

import json
import sys
import types
from pathlib import Path

import pytest
import yaml

from hf_aegis.cli import build_parser, compare
from hf_aegis.cli.compare import CompareArguments
from hf_aegis.cli.conditions import check_rollouts, resolve_conditions
from hf_aegis.cli.recipe import option_types, read_recipe
from hf_aegis.evaluation.rollouts import libero
from hf_aegis.functional.wilson import wilson_interval


RECIPES = Path(__file__).parents[2] / "recipes"
RECIPE = """
output_dir: {folder}
seeds: [0, 1]
jobs: 1
shared: {{max_steps: 20, vqa_final_samples: 0}}
conditions:
  naive: {{preserve: none}}
  small: {{preserve: none, expert: {{expert_num_layers: 1}}}}
libero: {{suite: [libero_object], episodes: 4, image_size: 64}}
"""


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    """For the figures, and for the benchmark, which need not be installed."""
    module = types.ModuleType("hf_aegis.cli.report")
    module.write_report = lambda folder: folder / "report.html"
    monkeypatch.setitem(sys.modules, "hf_aegis.cli.report", module)

    def chosen_tasks(suites, tasks):
        if suites != ["libero_object"]:
            raise ValueError(f"Unknown LIBERO suite {suites}")

    monkeypatch.setattr(libero, "chosen_tasks", chosen_tasks)


@pytest.fixture
def run(tmp_path, commands):
    def run(*options, text=RECIPE):
        path = tmp_path / "compare.yaml"
        path.write_text(text.format(folder=tmp_path / "out"))
        return compare.run(build_parser().parse_args(["compare", "--config", str(path), *options]))

    return run


def test_every_trained_model_acts(run, commands, tmp_path):
    assert run() == 0
    runs = [(name, seed) for seed in (0, 1) for name in ("naive", "small")]
    folder = tmp_path / "out" / "runs"
    assert commands.calls == [
        *(("train", "--config", f"{folder}/{name}/seed_{seed}.yaml") for name, seed in runs),
        *(("eval-libero", "--config", f"{folder}/{name}/seed_{seed}.libero.yaml") for name, seed in runs),
    ]
    assert yaml.safe_load((folder / "small" / "seed_1.libero.yaml").read_text()) == {
        "suite": ["libero_object"],
        "episodes": 4,
        "image_size": 64,
        "num_envs": commands.placement.threads,
        "model": f"{folder}/small/seed_1",
        "output": f"{folder}/small/seed_1/libero.json",
    }
    settings = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert settings["libero"] == {"suite": ["libero_object"], "episodes": 4, "image_size": 64}


def test_the_table_has_success_with_its_interval_over_all_seeds(run, commands, tmp_path):
    run()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    measure = results["conditions"]["naive"]["measures"]["libero_success"]
    low, high = wilson_interval(6, 8)
    assert measure == {"mean": 0.75, "std": 0.0, "n": 2, "interval": [low, high]}
    text = (tmp_path / "out" / "results.md").read_text()
    assert f"| 75.0 [{100 * low:.1f}, {100 * high:.1f}] | 2 |" in text

    assert "counted beside" in text


def test_finished_rollouts_are_not_repeated_and_others_are(run, commands, tmp_path):
    run()
    commands.calls.clear()
    assert run() == 0
    assert commands.calls == []
    # Without a section, nothing is run and what was measured stays in the table.
    assert run(text=RECIPE[: RECIPE.index("libero:")]) == 0
    assert commands.calls == []
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["libero"]["episodes"] == 4
    assert "75.0" in (tmp_path / "out" / "results.md").read_text()
    commands.interrupt_at = 3
    with pytest.raises(KeyboardInterrupt):
        run(text=RECIPE.replace("episodes: 4", "episodes: 8"))
    commands.interrupt_at = None
    assert run(text=RECIPE.replace("episodes: 4", "episodes: 8")) == 0
    assert commands.commands == ["eval-libero"] * 4
    assert len(set(commands.calls)) == 4


def test_a_model_that_was_not_trained_does_not_act_and_failures_are_kept(run, commands, tmp_path):
    commands.failing = {"small_seed_0", "naive_seed_1_libero"}
    assert run() == 1
    failed = json.loads((tmp_path / "out" / "results.json").read_text())["failed"]
    assert [(one["condition"], one["seed"], one["error"].split()[1]) for one in failed] == [
        ("small", 0, "train"),
        ("naive", 1, "eval-libero"),
    ]
    assert sum("small/seed_0.libero" in call[-1] for call in commands.calls) == 0
    commands.failing.clear()
    commands.calls.clear()
    assert run() == 0
    assert commands.commands == ["train", "eval-libero", "eval-libero"]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["failed"] == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("image_size: 64", "size: 64", r"compare.yaml, libero: unknown keys \['size'\]"),
        ("image_size: 64", "model: mine", r"libero: unknown keys \['model'\]"),
        ("episodes: 4", "episodes: 0", "libero: episodes must be at least 1, found 0"),
        ("episodes: 4", "episodes: many", "libero: key 'episodes' is 'many', expected int"),
        ("suite: [libero_object], ", "", "libero: suite is missing"),
        ("libero_object", "libero_subject", "libero: Unknown LIBERO suite"),
        ("image_size: 64", "replan_steps: 51", "replan_steps is 51, but a chunk of condition 'naive' has 50 actions"),
        ("image_size: 64", "head: fast", "head is 'fast', but condition 'naive' trains none"),
    ],
)
def test_a_wrong_section_is_refused_before_anything_is_trained(run, commands, old, new, message):
    with pytest.raises(ValueError, match=message):
        run(text=RECIPE.replace(old, new))
    assert commands.calls == []


def test_crashed_episodes_are_tried_again_if_asked(run, commands):
    run()
    commands.calls.clear()
    again = RECIPE.replace("episodes: 4", "episodes: 4, retry_crashed: true")
    run(text=again)
    assert commands.commands == ["eval-libero"] * 4
    commands.calls.clear()
    commands.crashed = 0
    run(text=again)
    assert commands.commands == ["eval-libero"] * 4
    commands.calls.clear()
    run(text=again)
    assert commands.calls == []


def test_other_pictures_than_the_demonstrations_are_warned_of(run, capsys):
    # Those that ship are rendered at 64 pixels, three times larger, without shadows.
    run()
    assert "warning" not in capsys.readouterr().err
    run(text=RECIPE.replace("image_size: 64", "rendering: standard, image_size: 64"))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "naive, small will see other pictures (image_size 64, supersampling 3, rendering standard)" in line
    assert "than the demonstrations' (image_size 64, supersampling 3, rendering fast)" in line


@pytest.mark.parametrize(
    "path", [path for path in RECIPES.glob("*.yaml") if "\nlibero:" in path.read_text()], ids=lambda path: path.stem
)
def test_recipes_let_act_what_they_train(path, monkeypatch):
    monkeypatch.chdir(path.parents[1])
    recipe = read_recipe(path, option_types([CompareArguments]))
    conditions = resolve_conditions(recipe["conditions"], recipe["shared"], {}, recipe.get("anchors", {}), path)
    assert check_rollouts(recipe["libero"], conditions, path) == []
