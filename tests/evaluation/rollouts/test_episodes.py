"""One episode: when it ends, when the policy is asked and looks, and what its line says."""

import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from hf_aegis.evaluation.rollouts import film
from hf_aegis.evaluation.rollouts.episodes import EpisodeResult, episode_seed, run_episode
from hf_aegis.evaluation.rollouts.film import captioned, evenly_spaced, read_film
from hf_aegis.evaluation.rollouts.policy import PolicyError, checked_chunk
from hf_aegis.evaluation.rollouts.protocols import PROTOCOLS
from hf_aegis.evaluation.rollouts.scores import RolloutScore, scores_by
from hf_aegis.functional.wilson import wilson_interval


@pytest.fixture
def fake():
    import fake_world

    return fake_world


def run(fake, policy, spec=None, beats=None):
    world = fake.FakeWorld()
    environment = world.open(None)
    (spec,) = [spec] if spec is not None else fake.specs(1)
    beat = (lambda: None) if beats is None else lambda: beats.append(environment.steps)
    return run_episode(environment, policy, spec, world.begin, beat), environment


def chunk(speed, length=6):
    actions = np.zeros((length, 7))
    actions[:, 0] = speed
    return actions


def test_an_episode_ends_with_the_first_step_that_succeeds(fake):
    policy = fake.Fixed(*[chunk(1.0)] * 5, cameras=("agentview_rgb",))
    spec = fake.specs(1)[0]
    result, environment = run(fake, policy, spec)
    # From between 0 and 0.1, a tenth at a time, beyond 1.
    start = np.random.default_rng(spec.seed).uniform(0.0, 0.1)
    steps = math.floor((1.0 - start) / 0.1) + 1
    assert (result.success, result.outcome, result.steps, result.error) == (True, "success", steps, None)
    assert len(environment.actions) == steps
    assert policy.told == ("go", spec.seed)
    # It looks before every fourth step, and nobody else does.
    assert [observation.step for observation in policy.seen] == list(range(0, steps, 4))
    assert environment.rendered == ["agentview"] * len(policy.seen)
    assert result.key == spec.key
    assert set(result.seconds) == {"reset", "rendering", "policy", "physics"}
    assert sum(result.seconds.values()) <= result.wall_s + 0.01


def test_an_episode_ends_at_the_step_limit(fake):
    policy = fake.Fixed(*[chunk(0.0)] * 5)
    result, environment = run(fake, policy, replace(fake.specs(1)[0], max_steps=10))
    assert (result.success, result.steps, result.error) == (False, 10, None)
    assert environment.rendered == []
    assert policy.seen[0].images == {}


def test_a_short_chunk_is_executed_whole_and_an_empty_one_is_the_end(fake):
    policy = fake.Fixed(chunk(0.1, 1), chunk(0.1, 3), chunk(0.1, 0))
    result, _ = run(fake, policy)
    assert (result.success, result.steps, result.error) == (False, 4, None)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (np.full((4, 7), np.nan), "action 0 of the chunk is nan in column 0"),
        (np.zeros((4, 6)), r"shape \(H, 7\), found \(4, 6\)"),
        (np.zeros(7), r"found \(7,\)"),
    ],
)
def test_what_cannot_be_executed_is_a_failure_that_says_so(fake, answer, message):
    with pytest.raises(PolicyError, match=message):
        checked_chunk(answer)
    result, environment = run(fake, fake.Fixed(chunk(0.1), answer))
    assert result.success is False
    assert result.error.startswith("policy: ")
    assert len(environment.actions) == 4


def test_signs_of_life(fake):
    beats = []
    run(fake, fake.Fixed(*[chunk(0.0)] * 10), beats=beats)
    assert beats == [0, 10, 20, 30, 40]


def test_seeds_tell_episodes_apart_and_nothing_else():
    seeds = {episode_seed(7, suite, task, start) for suite in "ab" for task in "cd" for start in range(50)}
    assert len(seeds) == 200
    assert episode_seed(7, "a", "c", 3) == episode_seed(7, "a", "c", 3) != episode_seed(8, "a", "c", 3)
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_protocols_have_the_published_limits():
    assert list(PROTOCOLS["openpi"].max_steps.values()) == [220, 280, 300, 520, 400]
    assert list(PROTOCOLS["lerobot"].max_steps.values()) == [280, 280, 300, 520, 400]


def result(start, success, steps=10, error=None, task="t"):
    return EpisodeResult("s", task, start, 0, success, steps, 1.0, error)


def test_crashed_episodes_are_counted_and_not_rated():
    results = [
        result(0, True, 10),
        result(1, True, 20),
        result(2, False),
        result(3, False, error="policy: NaN"),
        result(4, None, 0, "died"),
    ]
    score = RolloutScore.of(results)
    assert (score.episodes, score.successes, score.crashed, score.faults) == (4, 2, 1, 1)
    assert (score.success_rate, score.mean_steps) == (0.5, 15)
    assert score.interval == wilson_interval(2, 4)
    nothing = RolloutScore.of(results[-1:])
    assert (nothing.episodes, nothing.crashed, nothing.success_rate, nothing.interval) == (0, 1, None, None)


def test_scores_by_task():
    scores = scores_by([result(0, True, task="a"), result(0, False, task="b"), result(1, True, task="a")], "task")
    assert {name: score.success_rate for name, score in scores.items()} == {"a": 1.0, "b": 0.0}
    assert list(scores_by([result(0, True)], "suite", "task")) == ["s/t"]


def test_what_is_no_film_is_refused_by_name(tmp_path, monkeypatch):
    path = tmp_path / "episode.webp"
    with pytest.raises(FileNotFoundError):
        read_film(path)
    frames = [Image.new("RGB", (60, 50), (60 * index, 9, 9)) for index in range(4)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    whole = path.read_bytes()
    assert len(read_film(path)) == 4
    for data in (b"", b"no film", whole[: len(whole) // 2]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=rf"{path} cannot be read as a film"):
            read_film(path)
    path.write_bytes(whole)
    monkeypatch.setattr(film, "MAX_FILM_PIXELS", 10_000)
    with pytest.raises(ValueError, match=r"4 pictures of 60 x 50, expected at most 0\.01 million pixels"):
        read_film(path)


@pytest.mark.parametrize("suffix", ["webp", "gif"])
def test_a_film_shows_the_episode_to_its_end(fake, tmp_path, suffix):
    path = tmp_path / "films" / f"episode.{suffix}"
    spec = replace(fake.specs(1)[0], max_steps=9, film=str(path))
    filmed, environment = run(fake, fake.Fixed(*[chunk(0.5)] * 5), spec)
    alone, _ = run(fake, fake.Fixed(*[chunk(0.5)] * 5), replace(spec, film=None))
    assert filmed.steps == alone.steps == 9
    pictures = read_film(path)
    # Steps 0, 4, 8, and the end.
    assert len(pictures) == len(environment.rendered) == 4
    assert pictures[0].width == 256 < pictures[0].height
    brightness = [np.asarray(picture)[100, 100].mean() for picture in pictures]
    assert np.all(np.diff(brightness) > 0)


def test_another_format_of_film_is_refused_before_anything_is_written(fake, tmp_path):
    spec = replace(fake.specs(1)[0], film=str(tmp_path / "films" / "episode.avi"))
    with pytest.raises(ValueError, match=r"one of the formats .*found episode.avi"):
        run(fake, fake.Fixed(*[chunk(1.0)] * 5), spec)
    assert not (tmp_path / "films").exists()


def test_the_caption_has_the_outcomes_colour():
    frame = np.zeros((128, 128, 3), np.uint8)
    texts = {}
    for outcome in ("success", "failure"):
        picture = np.asarray(captioned(frame, "pick up the milk", "step 3 of 9", outcome))
        assert not picture[:128].any()
        texts[outcome] = picture[128:]
    assert (texts["success"] != texts["failure"]).any()
    longer = captioned(frame, "pick up the milk and put it where it has always been " * 3, "step 3", "failure")
    assert longer.height > 128 + len(texts["success"])


def test_moments_are_spread_from_first_to_last():
    assert evenly_spaced(list(range(11)), 3) == [0, 5, 10]
    assert evenly_spaced([1, 2], 6) == [1, 2]
