"""`hf-aegis eval-libero`: its options, its table, and once the real simulator."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from hf_aegis.assets import DEMO_CHECKPOINTS, DEMONSTRATIONS
from hf_aegis.cli import build_parser, eval_libero, main
from hf_aegis.cli.eval_libero import EvalLiberoArguments, format_table, score_table
from hf_aegis.data import PictureSettings
from hf_aegis.data.libero_pictures import pictures_of
from hf_aegis.evaluation.rollouts.episodes import EpisodeResult, EpisodeSpec
from hf_aegis.evaluation.rollouts.libero import plan_replays
from hf_aegis.evaluation.rollouts.model_policy import trained_pictures
from hf_aegis.evaluation.rollouts.protocols import PROTOCOLS, RolloutProtocol


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either model or policy, found None and None"),
        ({"model": "a", "policy": "zero"}, "give either model or policy"),
        ({"policy": "expert"}, "suite is missing"),
        ({"policy": "replay", "tasks": ["0"]}, "tasks are those of a suite"),
        ({"policy": "zero", "suite": ["libero_goal"], "episodes": 0}, "episodes must be at least 1, found 0"),
        ({"policy": "zero", "suite": ["libero_goal"], "replan_steps": 0}, "replan_steps must be at least 1"),
        ({"policy": "zero", "suite": ["libero_goal"], "seed": -1}, "seed must not be negative"),
        ({"policy": "zero", "suite": ["libero_goal"], "hang_seconds": 0.0}, "hang_seconds must be positive"),
        ({"policy": "zero", "suite": ["libero_goal"], "films": 1}, "output is missing"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        EvalLiberoArguments(**options)


def result(task, start, success, error=None):
    return EpisodeResult("libero_goal", task, start, 1, success, 12, 2.0, error, {"physics": 1.5, "rendering": 0.5})


def test_the_table_tells_crashes_from_failures():
    results = [result("a", 0, True), result("a", 1, False), result("b", 0, None, "died")]
    scores = score_table(results, {"protocol": "openpi"})
    assert (scores["episodes"], scores["successes"], scores["crashed"]) == (2, 1, 1)
    assert scores["seconds"] == {"physics": 4.5, "rendering": 1.5}
    json.dumps(scores, allow_nan=False)
    table = format_table(scores).splitlines()
    assert table[1].split() == ["libero_goal/a", "2", "50.0", "%", "9.5", "–", "90.5", "12", "0"]
    assert table[2].split() == ["libero_goal/b", "0", "–", "–", "–", "1"]
    assert "Success is over the episodes that ended" in table[-3]
    assert scores["errors"] == {"died": 1} and table[-2] == "1 x died"
    assert table[-1] == "Time of the episodes: physics 75%, rendering 25%."


def test_the_most_frequent_errors_are_shown():
    errors = ["a", "b", "b", "c", "d", "e"]
    table = format_table(score_table([result("t", n, None, e) for n, e in enumerate(errors)], {})).splitlines()
    assert table[-5:-1] == ["2 x b", "1 x a", "1 x c", "and 2 other errors, each beside its episode."]


def test_the_shipped_policies_know_their_pictures():
    for folder in DEMO_CHECKPOINTS.values():
        assert trained_pictures(folder) == SEEN == pictures_of(DEMONSTRATIONS)


@pytest.fixture
def saved(tmp_path):
    """The processor of a model whose training data were rendered as said."""
    from hf_aegis.assets import EMBEDDED_VLM
    from hf_aegis.models import PaliGemmaFlowProcessor

    def save(pictures):
        PaliGemmaFlowProcessor.from_vlm_processor(EMBEDDED_VLM, pictures=pictures).save_pretrained(tmp_path)
        return str(tmp_path)

    return save


SEEN = PictureSettings(64, 3, "fast")


@pytest.mark.parametrize(
    ("known", "chosen", "expected", "warning"),
    [
        (SEEN, {}, SEEN, None),
        (SEEN, {"image_size": 64, "supersampling": 3}, SEEN, None),
        (
            SEEN,
            {"rendering": "standard"},
            PictureSettings(64, 3, "standard"),
            "was trained on other pictures (image_si",
        ),
        (None, {}, PictureSettings(128, 1, "fast"), "does not say how the pictures it was trained on were rendered"),
        (None, {"image_size": 64}, PictureSettings(64, 1, "fast"), "it will see image_size 64, supersampling 1, rend"),
        (None, SEEN.to_dict(), SEEN, None),
    ],
)
def test_pictures_are_those_of_the_training(saved, capsys, known, chosen, expected, warning):
    asked = EvalLiberoArguments(model=saved(known), suite=["libero_goal"], **chosen)
    assert eval_libero._pictures(asked) == expected
    told = capsys.readouterr().err
    assert (told == "") if warning is None else (warning in told)


def test_films_that_were_not_made_are_told(tmp_path):
    def spec(start):
        return EpisodeSpec("s", "a", "a", start, 0, 9, 1, film=str(tmp_path / f"{start}.webp"))

    ended = {("s", "a", start): result("a", start, success) for start, success in enumerate((True, False, None))}
    (tmp_path / "0.webp").touch()
    assert eval_libero._never_filmed([spec(start) for start in range(4)], SimpleNamespace(results=ended)) == 1


def run(*options):
    return eval_libero.run(build_parser().parse_args(["eval-libero", *options]))


@pytest.mark.simulator
def test_the_shipped_demonstrations_can_all_be_replayed_from_what_is_recorded():
    pytest.importorskip("libero")
    specs = plan_replays([DEMONSTRATIONS], 50)
    assert len(specs) == 40 and len({spec.task for spec in specs}) == 10
    assert all(spec.max_steps == spec.replan_steps > 0 and spec.demonstration for spec in specs)
    with pytest.raises(ValueError, match="there is no demonstration of the chosen tasks"):
        plan_replays([DEMONSTRATIONS], 50, [])


@pytest.mark.slow
@pytest.mark.simulator
def test_a_replay_succeeds_a_film_changes_nothing_and_a_repeated_call_runs_nothing(tmp_path, capsys):
    pytest.importorskip("libero")
    output = tmp_path / "replay.json"
    replay = ("--policy", "replay", "--suite", "libero_object", "--tasks", "0", "--output", str(output))
    run(*replay, "--episodes", "2", "--num_envs", "1", "--films", "1")
    scores = json.loads(output.read_text())
    assert (scores["successes"], scores["episodes"], scores["crashed"]) == (2, 2, 0)
    lines = (tmp_path / "replay.json.episodes.jsonl").read_text()
    assert len(list(tmp_path.glob("*.films/libero_object/*_start_0.webp"))) == 1
    run(*replay, "--episodes", "2")
    assert (tmp_path / "replay.json.episodes.jsonl").read_text() == lines
    assert main(["eval-libero", *replay[:-1], str(output), "--demonstrations", "missing.hdf5"]) == 2
    assert "missing.hdf5" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.simulator
def test_all_shipped_demonstrations_replay_to_success(tmp_path):
    pytest.importorskip("libero")
    run("--policy", "replay", "--output", str(tmp_path / "replay.json"))
    scores = json.loads((tmp_path / "replay.json").read_text())
    assert (scores["successes"], scores["episodes"], scores["crashed"]) == (40, 40, 0)


@pytest.mark.slow
@pytest.mark.simulator
def test_doing_nothing_fails(tmp_path):
    pytest.importorskip("libero")
    suites = ("--suite", "libero_object", "libero_spatial", "--tasks", "0", "7")
    run("--policy", "zero", *suites, "--episodes", "1", "--output", str(tmp_path / "zero.json"))
    scores = json.loads((tmp_path / "zero.json").read_text())
    assert (scores["successes"], scores["episodes"], scores["crashed"]) == (0, 4, 0)


@pytest.mark.slow
@pytest.mark.simulator
def test_a_model_acts_the_same_in_a_fresh_and_in_a_used_simulator(tmp_path, monkeypatch):
    pytest.importorskip("libero")
    import torch

    from hf_aegis.assets import EMBEDDED_VLM
    from hf_aegis.data import LiberoDataset
    from hf_aegis.models import PaliGemmaFlowForAction, PaliGemmaFlowProcessor

    dataset = LiberoDataset(DEMONSTRATIONS, chunk_size=8)
    torch.manual_seed(0)
    PaliGemmaFlowForAction.from_vlm(EMBEDDED_VLM, chunk_size=8, dtype=torch.float32).save_pretrained(
        tmp_path / "model"
    )
    PaliGemmaFlowProcessor.from_vlm_processor(
        EMBEDDED_VLM, statistics=dataset.statistics, cameras=dataset.cameras
    ).save_pretrained(tmp_path / "model")
    monkeypatch.setitem(PROTOCOLS, "openpi", RolloutProtocol("openpi", "here", {"libero_object": 12}))
    lines = {}
    for name, num_envs in (("one", "1"), ("two", "2")):
        output = tmp_path / f"{name}.json"
        options = ("--suite", "libero_object", "--tasks", "0", "--episodes", "2", "--image_size", "64")
        run(
            "--model",
            str(tmp_path / "model"),
            *options,
            "--num_envs",
            num_envs,
            "--output",
            str(output),
            "--films",
            "2",
        )
        first, *rest = (tmp_path / f"{name}.json.episodes.jsonl").read_text().splitlines()
        assert json.loads(first)["settings"]["max_steps"] == {"libero_object": 12}
        found = sorted((json.loads(line) for line in rest), key=lambda line: line["start"])
        lines[name] = [(line["start"], line["success"], line["steps"], line["seed"], line["error"]) for line in found]
        scores = json.loads(output.read_text())
        assert scores["crashed"] == 0 and scores["seconds"].keys() >= {"rendering", "physics", "policy"}
    assert lines["one"] == lines["two"]
    # Where the hand ends is where all actions have brought it: the last pictures tell.
    from hf_aegis.evaluation.rollouts.film import read_film

    for film in sorted((tmp_path / "one.json.films").rglob("*.webp")):
        other = tmp_path / "two.json.films" / film.relative_to(tmp_path / "one.json.films")
        ends = [np.asarray(read_film(path)[-1], dtype=float) for path in (film, other)]
        assert np.abs(ends[0] - ends[1]).mean() < 1
