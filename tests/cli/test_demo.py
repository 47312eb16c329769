"""The demo: order of its commands, resuming, its table and its figures, with stand-ins for the commands."""

import argparse
import json
import math
import sys

import numpy as np
import pytest
import yaml
from PIL import Image

from hf_aegis.cli import demo, processes
from hf_aegis.reports.bands import series
from hf_aegis.reports.style import CONDITION_STYLES
from hf_aegis.reports.training_curves import plot_flow, plot_projection, plot_vqa


GROUPS = ["layers.0", "layers.1", "layers.2", "layers.10", "embeddings"]


def metrics(offset, projected=False):
    """A log as a training run of 20 steps writes it: several kinds of records, not every key in each."""
    records = [{"step": 0, "vqa_cross_entropy": 0.1, "vqa_accuracy": 0.9}]
    for step in (5, 10, 15, 20):
        figures = {"throttle_rate": 0.4, "energy_shed": 0.01 * step, "cosine": 0.1 - 0.01 * step, "penalty": 0.2}
        records.append({"step": step, "loss": 1 / step + offset, **(figures if projected else {})})
        records.append({"step": step, "vqa_cross_entropy": 0.1 + offset * step, "vqa_accuracy": 0.9 - 0.02 * step})
    return [*records, {"step": 20, "eval_loss": 0.3 + offset}, {"step": 20, "train_runtime": 3.0}]


def projections(cosine=lambda step, index: math.sin(step + index)):
    # A group without a finite gradient is missing from a step.
    return [
        {"step": step, "groups": GROUPS[step % 2 :], "cosine": [cosine(step, i) for i in range(step % 2, len(GROUPS))]}
        for step in range(1, 21)
    ]


def colours(path):
    """The colours of a picture, after it is checked to be a whole PNG."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    assert min(pixels.shape[:2]) > 200
    packed = np.unique(pixels.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.uint32))
    return {f"#{colour:06X}" for colour in packed.tolist()}


NAIVE, AEGIS = (CONDITION_STYLES[name]["color"] for name in ("naive", "aegis"))


def test_series_takes_the_records_that_have_the_key():
    steps, values = series([{"step": 0, "a": 1}, {"step": 1, "b": 2}, {"step": 4, "a": 3.5}], "a")
    assert steps.tolist() == [0, 4]
    assert values.tolist() == [1.0, 3.5]
    assert [array.tolist() for array in series([{"step": 0}], "a")] == [[], []]


def test_curves_show_every_condition(tmp_path):
    both = {"naive": metrics(0.02), "aegis": metrics(0.0)}
    plot_vqa(both, tmp_path / "vqa.png")
    plot_vqa({"aegis": both["aegis"]}, tmp_path / "one.png")
    plot_flow(both, 0.5, tmp_path / "flow.png")
    assert colours(tmp_path / "vqa.png") >= {NAIVE, AEGIS}
    assert NAIVE not in colours(tmp_path / "one.png")
    assert colours(tmp_path / "flow.png") >= {NAIVE, AEGIS}


def test_a_run_too_short_for_logs_still_has_figures(tmp_path):
    first = metrics(0.0)[:1]
    plot_vqa({"naive": first, "aegis": first}, tmp_path / "vqa.png")
    plot_flow({"naive": first, "aegis": first}, 0.5, tmp_path / "flow.png")
    plot_projection(first, projections()[:1], tmp_path / "projection.png")
    for path in tmp_path.iterdir():
        assert colours(path)


def test_conflicts_are_mapped_by_layer_and_step(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = {}
    image, ticks = Axes.imshow, Axes.set_yticks
    monkeypatch.setattr(Axes, "imshow", lambda self, data, **k: drawn.update(data=data) or image(self, data, **k))
    monkeypatch.setattr(
        Axes, "set_yticks", lambda self, at, names=None, **k: drawn.update(names=names) or ticks(self, at, names, **k)
    )
    plot_projection(metrics(0.0, projected=True), projections(), tmp_path / "projection.png")
    assert drawn["names"] == ["layer 0", "layer 1", "layer 2", "layer 10", "embeddings"]
    assert drawn["data"].shape == (len(GROUPS), 20)
    assert drawn["data"][3, 6] == math.sin(7 + 3)
    assert np.isnan(drawn["data"][0, 6])
    assert AEGIS in colours(tmp_path / "projection.png")


def test_gradients_that_never_correlate_are_drawn(tmp_path):
    plot_projection(metrics(0.0, projected=True), projections(lambda step, index: 0.0), tmp_path / "projection.png")
    assert AEGIS in colours(tmp_path / "projection.png")


def test_the_table_has_a_column_per_condition():
    summary = {
        "pretrained": {"vqa_cross_entropy": 0.0126, "vqa_accuracy": 0.9968},
        "naive": {"vqa_cross_entropy": 3.4567, "vqa_accuracy": 0.1, "flow_mse": 0.04321, "step_ms": 149.6},
        "aegis": {"vqa_cross_entropy": 0.02, "vqa_accuracy": 0.99, "throttle_rate": 0.415, "energy_shed": 0.0123},
    }
    rows = demo.format_table(summary).splitlines()
    assert rows[0].split() == ["pretrained", "naive", "aegis"]
    cells = {row[:32].strip(): row[32:].split() for row in rows[1:]}
    assert cells["VQA cross-entropy (nats/token)"] == ["0.0126", "3.4567", "0.0200"]
    assert cells["VQA accuracy (%)"] == ["99.7", "10.0", "99.0"]
    assert cells["held-out flow MSE"] == ["–", "0.0432", "–"]
    assert cells["step time (ms, median)"] == ["–", "150", "–"]
    assert cells["throttle rate (%)"] == ["–", "–", "41.5"]
    assert cells["energy shed (%)"] == ["–", "–", "1.23"]
    assert len({len(row) for row in rows}) == 1


@pytest.fixture
def logged(commands):
    """The commands, with logs that figures can be drawn from."""

    def lines(recipe):
        projected = recipe["preserve"] == "projection"
        logs = {"metrics": metrics(0.0 if projected else 0.02, projected)}
        return logs | {"projection": projections()} if projected else logs

    commands.lines = lines
    return commands


@pytest.fixture
def no_figures(monkeypatch):
    """Leaves out the figures and the merged log, for tests of what comes before them."""
    monkeypatch.setattr(demo, "_report", lambda folder, runs: None)


def run(folder, *options):
    options = ("--jobs", "2", *options)
    parser = argparse.ArgumentParser()
    demo.configure(parser)
    return demo.run(parser.parse_args(["--output_dir", str(folder), *options]))


def test_a_demo_runs_all_commands_in_order_and_reports(logged, tmp_path, capsys):
    folder = tmp_path / "demo"
    assert run(folder, "--max_steps", "20", "--vqa_final_samples", "60", "--seed", "3") == 0
    assert logged.calls == [
        ("eval-vqa", "--output", f"{folder}/pretrained.json", "--max_samples", "60", "--seed", "0"),
        ("anchor", "--config", f"{folder}/anchors/easy_vqa.yaml"),
        *(("train", "--config", f"{folder}/runs/{name}/seed_3.yaml") for name in demo.CONDITIONS),
    ]
    naive, aegis, pairs = (
        yaml.safe_load((folder / "runs" / name / "seed_3.yaml").read_text()) for name in demo.CONDITIONS
    )
    assert (naive["max_steps"], naive["seed"], naive["vqa_final_samples"]) == (20, 3, 60)
    # Everything else is shared, or the comparison would be of something else.
    assert {key for key in naive.keys() | aegis.keys() if naive.get(key) != aegis.get(key)} == {
        "preserve",
        "output_dir",
        "anchor",
    }
    assert {key for key in naive.keys() | pairs.keys() if naive.get(key) != pairs.get(key)} == {
        "preserve",
        "subspace_sensitivity",
        "penalties",
        "learning_rate",
        "output_dir",
        "anchor",
    }
    assert yaml.safe_load((folder / "anchors" / "easy_vqa.yaml").read_text()) == {
        "num_samples": 3000,
        "subspaces": True,
        "subspace_energy": 1.0,
        "sensitivity": True,
        "output_dir": aegis["anchor"],
    }
    assert pairs["anchor"] == aegis["anchor"]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["pretrained"] == {
        "vqa_cross_entropy": 0.1,
        "vqa_accuracy": 0.9,
        "vqa_accuracy_by_type": {"color": 0.8},
    }
    assert list(summary) == ["pretrained", "naive", "aegis", "held_pairs"]
    merged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert merged == [
        {"condition": name, **record}
        for name, records in {**dict.fromkeys(demo.CONDITIONS, metrics(0.02)), "aegis": metrics(0.0, True)}.items()
        for record in records
    ]
    for name in ("vqa", "flow", "projection"):
        assert AEGIS in colours(folder / f"{name}.png")
    printed = capsys.readouterr().out
    assert demo.format_table(summary) in printed
    assert "measured with 2 processes side by side; `make bench` measures them in turn" in printed
    assert "| aegis | 1 |" in (folder / "results.md").read_text()
    assert not list(folder.rglob("*.tmp"))


def test_defaults_are_those_of_the_module(commands, no_figures, tmp_path):
    run(tmp_path)
    recipe = yaml.safe_load((tmp_path / "runs" / "naive" / "seed_0.yaml").read_text())
    assert recipe["max_steps"] == demo.TRAINING["max_steps"]
    assert recipe["vqa_final_samples"] == demo.FINAL_QUESTIONS
    assert str(demo.FINAL_QUESTIONS) in commands.calls[0]


@pytest.mark.parametrize("interrupt_at", [1, 2, 3, 5])
def test_an_interrupted_demo_continues_and_a_finished_one_calls_nothing(commands, no_figures, tmp_path, interrupt_at):
    commands.interrupt_at = interrupt_at
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "--max_steps", "20")
    assert len(commands.calls) == interrupt_at - 1
    assert not (tmp_path / "summary.json").exists()
    commands.interrupt_at = None
    run(tmp_path, "--max_steps", "20")
    assert commands.commands == ["eval-vqa", "anchor", "train", "train", "train"]
    summary = (tmp_path / "summary.json").read_text()
    commands.calls.clear()
    assert run(tmp_path, "--max_steps", "20") == 0
    assert commands.calls == []
    assert (tmp_path / "summary.json").read_text() == summary


@pytest.mark.parametrize("failing", ["eval-vqa", "anchor_easy_vqa", "naive_seed_0", "aegis_seed_0"])
def test_a_demo_ends_with_the_command_that_failed(commands, no_figures, tmp_path, failing):
    commands.failing = {failing}
    with pytest.raises(OSError, match="ended with code 1"):
        run(tmp_path)
    assert not (tmp_path / "summary.json").exists()
    commands.failing = set()
    assert run(tmp_path) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max_steps", "40"), "max_steps is 20 there and 40 here"),
        (("--max_steps", "20", "--seed", "1"), "seed is 0 there and 1 here"),
        (("--max_steps", "20", "--vqa_final_samples", "9"), "vqa_final_samples is 2000 there and 9 here"),
    ],
)
def test_results_of_other_options_are_not_taken_for_these(commands, no_figures, tmp_path, options, message):
    run(tmp_path, "--max_steps", "20")
    commands.calls.clear()
    with pytest.raises(ValueError, match=f"holds a demo with other settings: {message}"):
        run(tmp_path, *options)
    assert commands.calls == []


def test_results_of_an_earlier_version_are_not_taken_for_these(commands, no_figures, tmp_path, monkeypatch):
    run(tmp_path)
    monkeypatch.setitem(demo.TRAINING, "learning_rate", 1e-5)
    with pytest.raises(ValueError, match=r"learning_rate is 0\.001 there and 1e-05 here"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("hf_aegis.cli.demo.ANCHORS", {"easy_vqa": {}}, "anchors is .*3000.* there and .* here"),
        ("hf_aegis.cli.demo.__version__", "9.9", "version is .* there and '9.9' here"),
    ],
)
def test_results_of_other_circumstances_are_not_taken_for_these(
    commands, no_figures, tmp_path, monkeypatch, place, value, message
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    run(tmp_path)
    monkeypatch.setattr(place, value)
    with pytest.raises(ValueError, match=message):
        run(tmp_path)


def test_a_demo_goes_on_as_it_began(commands, no_figures, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = iter((6, 154, 154))
    monkeypatch.setattr(processes, "available_cores", lambda: next(cores))
    run(tmp_path)
    run(tmp_path)
    machine = json.loads((tmp_path / "compare.json").read_text())["machine"]
    assert (machine["jobs"], machine["threads"]) == (2, 3)
    with pytest.raises(ValueError, match=r"jobs is 2 there and 1 here.*leave out jobs to continue"):
        run(tmp_path, "--jobs", "1")


def test_without_matplotlib_nothing_is_trained_for_figures(commands, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"hf-aegis\[demo\]"):
        run(tmp_path)
    assert commands.calls == []


def test_one_process_after_the_other_needs_no_note(commands, no_figures, tmp_path, capsys):
    run(tmp_path, "--jobs", "1")
    assert "side by side" not in capsys.readouterr().out


def test_scores_on_other_questions_are_not_compared(commands, no_figures, tmp_path):
    run(tmp_path)
    pretrained, result = tmp_path / "pretrained.json", tmp_path / "runs" / "aegis" / "seed_0" / "result.json"
    pretrained.write_text(json.dumps(json.loads(pretrained.read_text()) | {"fingerprint": "a"}))
    result.write_text(json.dumps(json.loads(result.read_text()) | {"fingerprints": {"vqa_final": "a"}}))
    assert run(tmp_path) == 0
    result.write_text(json.dumps(json.loads(result.read_text()) | {"fingerprints": {"vqa_final": "b"}}))
    with pytest.raises(ValueError, match=r"result\.json: key 'fingerprints\.vqa_final' is b, but .* is a:"):
        run(tmp_path)
