"""Inspection: what a report tells, that it stops at no problem, and the `hf-aegis data` commands."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from hf_aegis.cli import data as command
from hf_aegis.cli import main
from hf_aegis.cli.command_parser import CommandParser
from hf_aegis.data import LiberoDataset, format_report, inspect_file


def run(*arguments: object) -> int:
    return command.run(
        CommandParser(configure=command.configure).parse_args([str(argument) for argument in arguments])
    )


def test_a_sound_file_is_described(libero_files):
    path = libero_files.write(kind="recorded_jpeg")
    report = inspect_file(path)
    assert report.problems == []
    (summary,) = report.tasks
    assert (summary.task.suite, summary.task.name) == ("libero_object", "pick_up_the_milk")
    assert (summary.lengths, summary.image_sizes) == ([6, 7, 9], {8})
    assert report.statistics == LiberoDataset(path, chunk_size=3).statistics
    text = format_report(report)
    for line in (
        "libero_object / pick_up_the_milk",
        "3 sound of 3, 22 steps (6 to 9 each)",
        "jpeg, 8x8, origin top_left",
        "before action",
        "no problems",
    ):
        assert line in text


def test_every_problem_is_found(libero_files):
    path = libero_files.write()
    with h5py.File(path, "a") as file:
        data = file["data"]
        data.attrs["num_demos"] = 5
        data["demo_0/actions"][1, 1] = np.nan
        data["demo_0/obs/joint_states"][1, 1] = np.inf
        data["demo_1/states"][2, 3] = np.nan
        del data["demo_2/obs/agentview_rgb"]
        del data["demo_2"].attrs["num_samples"]
        file["elsewhere"] = h5py.ExternalLink("other.hdf5", "/")
    report = inspect_file(path)
    starts = [
        "/elsewhere: an external link",
        "/data@num_demos: says 5",
        "/data/demo_0/actions: 1 values",
        "/data/demo_0/obs/joint_states: 1 values",
        "/data/demo_1/states: 1 values are NaN or infinite, first at [2, 3]",
        "/data/demo_2/obs/agentview_rgb: missing",
        "/data/demo_2@num_samples: missing",
    ]
    assert [problem[: len(start)] for problem, start in zip(report.problems, starts, strict=True)] == starts
    assert report.statistics is None
    assert "0 sound of 3, no sound steps" in format_report(report)
    assert "7 problems" in format_report(report)


def test_statistics_leave_unsound_demonstrations_out(libero_files):
    path = libero_files.write()
    with h5py.File(path, "a") as file:
        file["data/demo_1/actions"][0, 0] = np.nan
    statistics = inspect_file(path).statistics
    actions = np.concatenate([libero_files.arrays(0, 6)["actions"], libero_files.arrays(2, 9)["actions"]])
    assert statistics.actions.count == 15
    np.testing.assert_allclose(statistics.actions.mean, actions.mean(axis=0))


def test_dimensions_that_hardly_move_are_marked(libero_files):
    path = libero_files.write()
    with h5py.File(path, "a") as file:
        for name in file["data"]:
            file[f"data/{name}/actions"][:, 4] = 0.0
    marked = [line for line in format_report(inspect_file(path)).splitlines() if line.endswith("hardly moves")]
    assert [line.split()[0] for line in marked] == ["pitch"]


def test_the_inspect_command_goes_on_after_a_bad_file(libero_files, tmp_path, capsys):
    good = libero_files.write("libero_object/good.hdf5")
    assert run("inspect", good) == 0
    assert run("inspect", tmp_path / "absent.hdf5", good.parent) == 1
    output = capsys.readouterr().out
    assert "absent.hdf5: no such file" in output
    assert "libero_object / good" in output.split("absent.hdf5: no such file")[1]


def test_the_combine_command(libero_files, tmp_path, capsys):
    output = tmp_path / "all.hdf5"
    path = libero_files.write("plain/task.hdf5")
    with h5py.File(path, "a") as file:
        del file["data"].attrs["bddl_file_name"]
    assert run("combine", path, "--output", output, "--suite", "mine") == 0
    assert f"wrote {output}" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match="--overwrite"):
        run("combine", path, "--output", output, "--suite", "mine")
    assert run("combine", path, "--output", output, "--suite", "mine", "--overwrite") == 0
    assert inspect_file(output).tasks[0].task.suite == "mine"


@pytest.fixture
def recorded(monkeypatch):
    """Stands in for the simulator: the configurations that would have been recorded."""
    from hf_aegis.data import libero_recorder

    configurations: list[libero_recorder.RecordingConfig] = []

    def record(config):
        configurations.append(config)
        return [libero_recorder.RecordingSummary("libero_object", "milk", "milk.hdf5", 2, 3, 200)]

    monkeypatch.setattr(libero_recorder, "record", record)
    return configurations


def test_the_record_command_reads_recipe_and_options(recorded, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("output_dir: from_recipe\ntasks: [libero_object/1]\nimage_size: 64\nframes: jpeg\n")
    assert run("record-libero", "--config", recipe, "--image_size", 32, "--tasks", "libero_goal", "libero_10") == 0
    (config,) = recorded
    assert (config.output_dir, config.frames, config.image_size) == ("from_recipe", "jpeg", 32)
    assert config.tasks == ["libero_goal", "libero_10"]
    assert "libero_object/milk: 2 demonstrations, 200 steps, 3 attempts, milk.hdf5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output_dir: [", "not valid YAML"),
        ("- a", "expected a mapping of options, found list"),
        ("output_dir: a\nsize: 3", r"unknown keys \['size'\], expected some of "),
        ("output_dir: a\nimage_size: '64'", "key 'image_size' is '64', expected int"),
        ("output_dir: a\ntasks: libero_object", r"key 'tasks' is 'libero_object', expected list\[str\]"),
        ("output_dir: a\nframes: png", "key 'frames' is 'png', expected 'raw' or 'jpeg'"),
        ("seed: 3", "required: --output_dir"),
    ],
)
def test_a_bad_recipe_is_refused(recorded, tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        run("record-libero", "--config", tmp_path / "recipe.yaml")
    assert recorded == []


def test_a_recording_that_fails_ends_with_one_line(recorded, monkeypatch, capsys):
    from hf_aegis.data import libero_recorder

    def fail(config):
        raise libero_recorder.RecordingError("the expert failed")

    monkeypatch.setattr(libero_recorder, "record", fail)
    assert main(["data", "record-libero", "--output_dir", "somewhere"]) == 2
    assert capsys.readouterr().err == "hf-aegis data: error: the expert failed\n"


@pytest.mark.parametrize("recipe", sorted(Path(__file__).parents[2].glob("recipes/libero_*record*.yaml")), ids=str)
def test_shipped_recording_recipes_are_accepted(recorded, recipe):
    assert run("record-libero", "--config", recipe) == 0
    assert len(recorded) == 1


def test_help_of_every_sub_command(capsys):
    for name in ("record-libero", "combine", "inspect"):
        with pytest.raises(SystemExit) as ended:
            run(name, "--help")
        assert ended.value.code == 0
    assert "--num_demonstrations" in capsys.readouterr().out


def test_problem_info_with_unreadable_json_leaves_other_tasks_described(libero_files, tmp_path):
    from hf_aegis.data import combine

    combined = combine(
        [libero_files.write("libero_object/a.hdf5"), libero_files.write("libero_object/b.hdf5")], tmp_path / "all.hdf5"
    )
    with h5py.File(combined, "a") as file:
        file["libero_object/a/data"].attrs["problem_info"] = json.dumps("text")
    report = inspect_file(combined)
    assert [summary.task.name for summary in report.tasks] == ["b"]
    assert report.problems == ["/libero_object/a/data@problem_info: its text: expected a JSON object, found 'text'"]
