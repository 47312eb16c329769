"""Comparing conditions over seeds: merging and checking recipes, order, resuming, failures, with stand-in commands."""

import json
import sys
import types

import pytest
import yaml

from hf_aegis.cli import build_parser, compare, comparison, main, processes
from hf_aegis.cli.processes import Placement
from hf_aegis.cli.recipe import merged


RECIPE = """
output_dir: {folder}
seeds: [0, 1]
shared:
  max_steps: 20
  vqa_final_samples: 60
  learning_rate: 1e-3
  expert: {{expert_num_layers: 3, expert_hidden_size: 128}}
anchors:
  easy: {{num_samples: 90}}
  unused: {{num_samples: 30}}
conditions:
  naive:
    preserve: none
  small:
    preserve: none
    expert: {{expert_num_layers: 1}}
    learning_rate: 0.5
  aegis:
    preserve: projection
    anchor: easy
"""


@pytest.fixture(autouse=True)
def reports(monkeypatch):
    """Stands in for the figures; holds the folders that a report was asked for."""
    folders = []
    module = types.ModuleType("hf_aegis.cli.report")
    module.write_report = lambda folder: folders.append(folder) or folder / "report.html"
    monkeypatch.setitem(sys.modules, "hf_aegis.cli.report", module)
    return folders


@pytest.fixture
def run(tmp_path, commands):
    """Runs `hf-aegis compare` on a recipe, the one above by default."""

    def run(*options, text=RECIPE):
        path = tmp_path / "compare.yaml"
        path.write_text(text.format(folder=tmp_path / "out"))
        # What a stand-in does takes no time, but what the machine offers has to be one thing.
        if "--jobs" not in options and "jobs:" not in text:
            options = (*options, "--jobs", "2")
        return compare.run(build_parser().parse_args(["compare", "--config", str(path), *options]))

    return run


def test_mappings_are_merged_key_by_key():
    lower = {"a": 1, "expert": {"layers": 3, "width": {"x": 1, "y": 2}}, "names": [1, 2]}
    upper = {"b": 2, "expert": {"layers": 1, "width": {"y": 3}}, "names": [3]}
    result = merged(lower, upper, {"a": None})
    assert result == {
        "a": None,
        "b": 2,
        "expert": {"layers": 1, "width": {"x": 1, "y": 3}},
        "names": [3],
    }
    assert lower["expert"] == {"layers": 3, "width": {"x": 1, "y": 2}}
    assert merged({"expert": {"layers": 1}}, {"expert": None}) == {"expert": None}


def test_a_comparison_runs_seed_by_seed_and_reports(run, commands, reports, tmp_path, capsys):
    folder = tmp_path / "out"
    assert run() == 0
    # What a run asks at its end; for all else the defaults of the two commands agree.
    questions = {"dtype": "float32", "dataset": "easy-vqa", "split": "test", "max_samples": "60", "seed": "0"}
    assert commands.calls == [
        (
            *("eval-vqa", "--output", f"{folder}/pretrained.json"),
            *(text for name, value in questions.items() for text in (f"--{name}", value)),
        ),
        ("anchor", "--config", f"{folder}/anchors/easy.yaml"),
        *(
            ("train", "--config", f"{folder}/runs/{name}/seed_{seed}.yaml")
            for seed in (0, 1)
            for name in ("naive", "small", "aegis")
        ),
    ]
    assert (commands.total, commands.progress) == (120, 120)
    small, aegis = (
        yaml.safe_load((folder / "runs" / name / "seed_1.yaml").read_text()) for name in ("small", "aegis")
    )
    assert small == {
        "max_steps": 20,
        "vqa_final_samples": 60,
        "learning_rate": 0.5,
        "expert": {"expert_num_layers": 1, "expert_hidden_size": 128},
        "preserve": "none",
        "seed": 1,
        "output_dir": f"{folder}/runs/small/seed_1",
    }
    assert aegis["anchor"] == f"{folder}/anchors/easy"
    assert yaml.safe_load((folder / "anchors" / "easy.yaml").read_text()) == {
        "num_samples": 90,
        "output_dir": f"{folder}/anchors/easy",
    }
    settings = json.loads((folder / "compare.json").read_text())
    assert list(settings["conditions"]) == ["naive", "small", "aegis"]
    assert settings["conditions"]["aegis"]["anchor"] == "easy"
    assert settings["seeds"] == [0, 1]
    results = json.loads((folder / "results.json").read_text())
    assert [(r["seed"], r["condition"]) for r in results["runs"]] == [
        (seed, name) for name in ("naive", "small", "aegis") for seed in (0, 1)
    ]
    assert results["failed"] == []
    assert reports == [folder]
    assert (folder / "results.md").read_text() in capsys.readouterr().out


def test_a_finished_comparison_is_not_repeated(run, commands, reports, tmp_path):
    run()
    commands.calls.clear()
    assert run() == 0
    assert commands.calls == []
    assert reports == [tmp_path / "out"] * 2


@pytest.mark.parametrize("interrupt_at", [1, 2, 3, 5, 8])
def test_an_interrupted_comparison_continues(run, commands, interrupt_at):
    commands.interrupt_at = interrupt_at
    with pytest.raises(KeyboardInterrupt):
        run()
    assert len(commands.calls) == interrupt_at - 1
    commands.interrupt_at = None
    assert run() == 0
    assert commands.commands == ["eval-vqa", "anchor", *["train"] * 6]
    assert len(set(commands.calls)) == 8


def test_results_are_written_after_every_run(run, commands, tmp_path):
    commands.interrupt_at = 5
    with pytest.raises(KeyboardInterrupt):
        run()
    text = (tmp_path / "out" / "results.md").read_text()
    assert "| naive | 1 of 2 |" in text
    assert "| aegis | 0 of 2 |" in text


def test_a_run_that_fails_is_noted_and_the_others_go_on(run, commands, reports, tmp_path, capsys):
    commands.failing = {"small_seed_0", "aegis_seed_1"}
    assert run() == 1
    assert len(commands.calls) == 8
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    error = "hf-aegis train ended with code 1"
    assert results["failed"] == [
        {"condition": "small", "seed": 0, "error": error},
        {"condition": "aegis", "seed": 1, "error": error},
    ]
    assert [condition["runs"] for condition in results["conditions"].values()] == [2, 1, 1]
    assert reports == [tmp_path / "out"]
    captured = capsys.readouterr()
    assert "2 of 6 runs failed: small seed 0, aegis seed 1; their logs are in" in captured.err
    assert "| small | 1 of 2 |" in captured.out

    # What failed stays on record until it is tried again.
    commands.failing.clear()
    commands.calls.clear()
    assert run("--only", "small") == 0
    assert [call[-1].split("/runs/")[1] for call in commands.calls] == ["small/seed_0.yaml"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [failure["condition"] for failure in results["failed"]] == ["aegis"]
    assert run() == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["failed"] == []


def test_without_a_finished_run_there_is_a_table_but_no_report(run, commands, reports, tmp_path, capsys):
    commands.failing = {f"{name}_seed_{seed}" for name in ("naive", "small", "aegis") for seed in (0, 1)}
    assert run() == 1
    assert "| naive | 0 of 2 |" in (tmp_path / "out" / "results.md").read_text()
    assert "6 of 6 runs failed" in capsys.readouterr().err
    assert reports == []


def test_a_failing_preparation_ends_the_comparison(run, commands, reports):
    commands.failing = {"anchor_easy"}
    with pytest.raises(OSError, match="hf-aegis anchor ended with code 1"):
        run()
    assert "train" not in commands.commands
    assert reports == []


def test_a_part_can_be_run_first(run, commands, tmp_path):
    assert run("--only", "small") == 0
    assert [name for name in commands.commands if name != "train"] == ["eval-vqa"]
    assert list(json.loads((tmp_path / "out" / "results.json").read_text())["conditions"]) == ["small"]
    run("--only", "naive", "aegis")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    # In the recipe's order.
    assert list(results["conditions"]) == ["naive", "small", "aegis"]
    assert [condition["runs"] for condition in results["conditions"].values()] == [2, 2, 2]


def test_conditions_and_seeds_can_be_added(run, commands, tmp_path):
    run()
    commands.calls.clear()
    more = RECIPE + "  third:\n    preserve: none\n    max_steps: 30\n"
    assert run("--seeds", "1", "4", text=more) == 0
    assert [call[-1].split("/runs/")[1] for call in commands.calls] == [
        "third/seed_1.yaml",
        *(f"{name}/seed_4.yaml" for name in ("naive", "small", "aegis", "third")),
    ]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["settings"]["seeds"] == [0, 1, 4]
    assert [condition["runs"] for condition in results["conditions"].values()] == [3, 3, 3, 2]


@pytest.mark.parametrize(
    ("old", "new", "options", "message"),
    [
        (
            "max_steps: 20",
            "max_steps: 21",
            (),
            r"runs/naive/seed_0\.yaml was run .* max_steps is 20 there and 21 here",
        ),
        ("learning_rate: 0.5", "learning_rate: 0.4", (), r"runs/small/seed_0\.yaml .* 0\.5 there and 0\.4 here"),
        ("preserve: projection", "preserve: none", (), r"runs/aegis/seed_0\.yaml .* preserve is 'projection' there"),
        ("num_samples: 90", "num_samples: 91", (), r"anchors/easy\.yaml was run .* num_samples is 90 there and 91"),
        ("seeds: [0, 1]", "seeds: [0, 1]", ("--jobs", "1"), r"out holds a comparison .* jobs is 2 there and 1 here"),
        ("", "", ("--override", '{"vqa_seed": 3}'), r"with other settings: vqa_seed is None there and 3 here"),
    ],
)
def test_results_of_other_settings_are_not_mixed(run, commands, old, new, options, message):
    run()
    commands.calls.clear()
    with pytest.raises(ValueError, match=message):
        run(*options, text=RECIPE.replace(old, new))
    assert commands.calls == []


def test_settings_of_conditions_that_were_not_run_may_change(run, commands):
    run("--only", "naive")
    assert run(text=RECIPE.replace("learning_rate: 0.5", "learning_rate: 0.4")) == 0


def test_jobs_and_threads_stay_those_of_the_folder(run, commands, monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    run("--jobs", "3", "--only", "naive")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setattr(processes, "available_cores", lambda: 64)
    path = tmp_path / "compare.yaml"
    assert compare.run(build_parser().parse_args(["compare", "--config", str(path)])) == 0
    assert commands.placement == Placement(jobs=3, threads=5, gpus=commands.placement.gpus)


def test_a_folder_may_be_moved(run, commands, tmp_path, capsys):
    commands.interrupt_at = 6
    with pytest.raises(KeyboardInterrupt):
        run()
    commands.interrupt_at = None
    commands.calls.clear()
    # Begun, but not finished.
    begun = tmp_path / "out" / "runs" / "aegis" / "seed_0"
    (begun / "result.json").unlink()
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere"
    assert run("--output_dir", str(moved)) == 0
    assert commands.calls == [
        ("train", "--config", f"{moved}/runs/{name}/seed_{seed}.yaml")
        for name, seed in (("aegis", 0), ("naive", 1), ("small", 1), ("aegis", 1))
    ]
    for name in ("runs/aegis/seed_0.yaml", "runs/aegis/seed_0/recipe.yaml"):
        recipe = yaml.safe_load((moved / name).read_text())
        assert recipe["output_dir"] == f"{moved}/runs/aegis/seed_0"
        assert recipe["anchor"] == f"{moved}/anchors/easy"
    assert yaml.safe_load((moved / "anchors/easy/recipe.yaml").read_text())["output_dir"] == f"{moved}/anchors/easy"
    # Another anchor is not this one moved.
    commands.calls.clear()
    elsewhere = RECIPE.replace("anchor: easy", "anchor: some/easy")
    with pytest.raises(ValueError, match=r"anchor is 'easy' there and 'some/easy' here"):
        run("--output_dir", str(moved), text=elsewhere)


def test_what_is_recorded_tells_of_no_machine(run, commands, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["hf-aegis", "compare", "--config", f"{tmp_path}/compare.yaml", "--jobs", "2"])
    monkeypatch.chdir(tmp_path)
    commands.failing = {"small_seed_0"}
    commands.error = f"no /data/x.hdf5 (all of it in {tmp_path}/out/logs/small_seed_0.log)"
    run()
    settings = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert settings["command"] == "hf-aegis compare --config compare.yaml --jobs 2"
    (failure,) = json.loads((tmp_path / "out" / "failures.json").read_text())
    assert failure["error"] == "no x.hdf5 (all of it in logs/small_seed_0.log)"
    for name in ("results.json", "results.csv", "results.md"):
        text = (tmp_path / "out" / name).read_text()
        assert str(tmp_path) not in text
        assert "/data" not in text


def test_without_matplotlib_there_is_no_report_and_that_is_said_before(run, commands, reports, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    commands.interrupt_at = 1
    with pytest.raises(KeyboardInterrupt):
        run()
    assert "No report will be written: figures need matplotlib" in capsys.readouterr().err
    commands.interrupt_at = None
    assert run() == 0
    assert reports == []
    assert "No report was written: figures need matplotlib" in capsys.readouterr().out


def test_a_condition_may_be_a_recipe_of_its_own(run, commands, tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "own.yaml").write_text("output_dir: elsewhere\nseed: 7\npreserve: none\nmax_steps: 40\n")
    run(text=RECIPE + "  own: recipes/own.yaml\n")
    recipe = yaml.safe_load((tmp_path / "out" / "runs" / "own" / "seed_1.yaml").read_text())
    assert (recipe["max_steps"], recipe["seed"], recipe["learning_rate"]) == (40, 1, "1e-3")
    assert recipe["output_dir"] == f"{tmp_path}/out/runs/own/seed_1"


def test_a_comparison_may_extend_another_recipe(run, commands, tmp_path):
    shared, conditions = RECIPE.index("shared:"), RECIPE.index("conditions:")
    base = tmp_path / "base.yaml"
    base.write_text(RECIPE[shared:conditions].format())
    own = RECIPE[:shared] + "extends: base.yaml\nshared: {{max_steps: 30, expert: {{expert_num_heads: 2}}}}\n"
    run(text=own + RECIPE[conditions:])
    recipe = yaml.safe_load((tmp_path / "out" / "runs" / "aegis" / "seed_0.yaml").read_text())
    assert (recipe["max_steps"], recipe["vqa_final_samples"]) == (30, 60)
    assert recipe["expert"] == {"expert_num_layers": 3, "expert_hidden_size": 128, "expert_num_heads": 2}
    assert "anchor" in commands.commands
    base.write_text("conditionz: {}\n")
    with pytest.raises(ValueError, match=r"base\.yaml: unknown keys \['conditionz'\]"):
        run(text=own + RECIPE[conditions:])


def test_an_override_wins_over_everything(run, commands, tmp_path):
    run("--override", '{"learning_rate": 0.1, "expert": {"expert_num_heads": 2}}')
    recipe = yaml.safe_load((tmp_path / "out" / "runs" / "small" / "seed_0.yaml").read_text())
    assert recipe["learning_rate"] == 0.1
    assert recipe["expert"] == {"expert_num_layers": 1, "expert_hidden_size": 128, "expert_num_heads": 2}


def test_anchor_and_questions_are_of_the_conditions_model(run, commands, tmp_path):
    run("--override", '{"model": "org/model", "dtype": "bfloat16", "vqa_seed": 5}')
    assert yaml.safe_load((tmp_path / "out" / "anchors" / "easy.yaml").read_text())["model"] == "org/model"
    options = dict(zip(commands.calls[0][1::2], commands.calls[0][2::2], strict=True))
    assert (options["--model"], options["--dtype"], options["--seed"]) == ("org/model", "bfloat16", "5")


def test_questions_after_training_are_those_asked_before(run, commands):
    run("--override", '{"vqa_dataset": "a", "vqa_split": "b", "vqa_final_dataset": "c", "vqa_final_samples": null}')
    options = dict(zip(commands.calls[0][1::2], commands.calls[0][2::2], strict=True))
    assert (options["--dataset"], options["--split"]) == ("c", "b")
    assert "--max_samples" not in options


def test_without_questions_nothing_is_asked_before(run, commands, tmp_path):
    run("--override", '{"vqa_final_samples": 0}')
    assert "eval-vqa" not in commands.commands
    assert "before" not in (tmp_path / "out" / "results.md").read_text()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("max_steps: 20", "max_stepps: 20", r"compare\.yaml, shared: unknown keys \['max_stepps'\]"),
        ("max_steps: 20", "max_steps: many", r"compare\.yaml, shared: key 'max_steps' is 'many', expected int"),
        ("learning_rate: 0.5", "seed: 3", r"compare\.yaml, condition 'small': unknown keys \['seed'\]"),
        ("anchor: easy", "anchor: [1]", r"condition 'aegis': key 'anchor' is \[1\], expected str or null"),
        ("anchor: easy", "anchor: eazy", r"condition 'aegis': key 'anchor' is 'eazy', expected one of the anchors"),
        ("preserve: projection", "preserve: projecton", r"condition 'aegis': .*projecton"),
        ("learning_rate: 0.5", "vqa_steps: 0", r"condition 'small': vqa_steps must be positive, found 0"),
        (
            "learning_rate: 0.5",
            "dtype: float64",
            r"condition 'small': key 'dtype' is 'float64', but None in condition",
        ),
        (
            "max_steps: 20",
            "dtype: float64\n  max_steps: 20",
            r"anchor 'easy': key 'dtype' is 'float64', expected 'float32' or 'bfloat16'",
        ),
        ("expert_num_layers: 1", "expert_layers: 1", r"condition 'small': expert: unknown key 'expert_layers'"),
        ("learning_rate: 0.5", "lora: {{rank: 4}}", r"condition 'small': lora: unknown key 'rank'"),
        ("learning_rate: 0.5", "fast: {{size: 4}}", r"condition 'small': fast: unknown key 'size'"),
        ("learning_rate: 0.5", "replay_samples: 0", r"condition 'small': replay_samples must be at least 1, found 0"),
        ("num_samples: 90", "samples: 90", r"compare\.yaml, anchor 'easy': unknown keys \['samples'\]"),
        ("num_samples: 30", "num_samples: a", r"compare\.yaml, anchor 'unused': key 'num_samples' is 'a'"),
        ("num_samples: 90", "num_samples: 0", r"anchor 'easy': num_samples must be at least 1, found 0"),
        ("seeds: [0, 1]", "seeds: [0, 0]", r"seeds must be different numbers, at least one, found \[0, 0\]"),
        ("seeds: [0, 1]", "seeds: []", r"seeds must be different numbers"),
        ("seeds: [0, 1]", "only: [nave]", r"only: unknown conditions \['nave'\], expected some of \['naive', "),
        (
            "seeds: [0, 1]",
            "gap: [naive, nave]",
            r"gap must be two different conditions of \['naive', ",
        ),
        ("seeds: [0, 1]", "gap: [naive, naive]", "gap must be two different conditions"),
        ("seeds: [0, 1]", "jobs: 0", "jobs must be at least 1, found 0"),
        ("  naive:", "  na/ive:", r"conditions: a name has letters, digits, '_' and '-' only, found 'na/ive'"),
        ("preserve: none\n  small:", "preserve: none\n  other: no.yaml\n  small:", r"no\.yaml"),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_runs(run, commands, tmp_path, old, new, message):
    with pytest.raises((ValueError, OSError), match=message):
        run(text=RECIPE.replace(old, new, 1))
    assert commands.calls == []
    assert not (tmp_path / "out").exists()


def test_one_comparison_at_a_time_in_a_folder(run, tmp_path):
    from hf_aegis.training.run_lock import locked_folder

    with (
        locked_folder(tmp_path / "out"),
        pytest.raises(ValueError, match="another process is running in"),
    ):
        run()


def test_progress_is_read_off_a_log_that_is_being_written(tmp_path):
    one = comparison.Run("naive", 0, tmp_path)
    assert one.steps_done() == 0
    one.folder.mkdir(parents=True)
    (one.folder / "metrics.jsonl").write_text('{"step": 0, "loss": 1}\n{"step": 20, "loss": 1}\n{"step": 3')
    assert one.steps_done() == 20


@pytest.mark.slow
def test_a_small_comparison_in_real_processes(tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "hf_aegis.cli.report")
    monkeypatch.chdir(tmp_path)
    expert = {"expert_hidden_size": 16, "expert_num_layers": 1, "expert_num_heads": 2, "expert_intermediate_size": 32}
    shared = {"max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
    shared |= {"vqa_samples": 16, "vqa_final_samples": 32, "vqa_steps": 3, "action_samples": 2, "expert": expert}
    conditions = {
        "naive": {"preserve": "none"},
        "aegis": {"anchor": "few"},
        "broken": {"preserve": "none", "demonstrations": ["none.hdf5"]},
    }
    recipe = {"output_dir": "out", "shared": shared, "anchors": {"few": {"num_samples": 30}}, "conditions": conditions}
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    options = ["compare", "--config", str(path), "--jobs", "2"]
    assert main(options) == 1
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [condition["runs"] for condition in results["conditions"].values()] == [1, 1, 0]
    assert [failure["condition"] for failure in results["failed"]] == ["broken"]
    assert "none.hdf5: no such file or folder" in results["failed"][0]["error"]
    naive, aegis = results["runs"]
    for key in ("vqa_cross_entropy", "vqa_accuracy", "vqa_accuracy_change", "flow_mse", "step_ms", "peak_memory_mb"):
        assert {type(run[key]) for run in (naive, aegis)} == {float}, key
    assert "throttle_rate" in aegis
    assert "throttle_rate" not in naive
    assert results["before"]["vqa_accuracy"] > 0.9
    assert (tmp_path / "out" / "report.html").exists()
    assert "1 of 3 runs failed: broken seed 0" in capsys.readouterr().err

    trained = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("runs/*/*/result.json")}
    assert main([*options, "--only", "naive", "aegis"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("runs/*/*/result.json")} == trained
