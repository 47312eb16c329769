import json
from dataclasses import replace

import numpy as np
import pytest
from acting import follow, gripper_closes, predict, project
from loading import load
from observations import held_out_episodes, observe
from settings import FOLDER, demonstrations, shown_models

from hf_aegis.data import LiberoDataset


EPISODES = held_out_episodes(demonstrations())


def test_the_episodes_are_those_that_training_leaves_out():
    dataset = LiberoDataset(demonstrations(), split="held_out", normalize=False)
    assert [episode.instruction for episode in EPISODES] == dataset.instructions
    assert sum(episode.length for episode in EPISODES) == len(dataset)
    item, seen = dataset[EPISODES[0].length + 7], observe(EPISODES[1], 7, 50)
    assert np.array_equal(item["images"][0], seen.images[0])
    np.testing.assert_allclose(item["state"], seen.state, rtol=1e-6)
    np.testing.assert_allclose(item["actions"][: len(seen.actions)], seen.actions, rtol=1e-6)


def test_an_observation_at_the_end_has_what_is_left():
    episode = EPISODES[0]
    seen = observe(episode, episode.length - 1, 50)
    assert seen.actions.shape == (1, 7)
    assert seen.positions.shape == (1, 3)
    with pytest.raises(ValueError, match="step must be from 0"):
        observe(episode, episode.length, 50)


@pytest.mark.parametrize("episode", EPISODES[::5], ids=lambda episode: episode.suite)
def test_the_gripper_is_where_something_moves_in_the_picture(episode):
    """No use is made of the camera's pose: frames half a second apart differ where the hand was or is."""
    near, far = [], []
    rows, columns = np.mgrid[0:64, 0:64] / 64 + 0.5 / 64
    for step in range(10, 50, 5):
        before, after = observe(episode, step, 10), observe(episode, step + 10, 10)
        changed = np.abs(before.images[0].astype(float) - after.images[0]).sum(axis=-1)
        ends = project(np.stack([before.positions[0], after.positions[0]]), episode.scene)
        distance = np.min([np.hypot(columns - x, rows - y) for x, y in ends], axis=0)
        near.append(changed[distance < 0.1].mean())
        far.append(changed[distance > 0.3].mean())
    assert np.mean(near) > 4 * np.mean(far)


def test_recorded_actions_lead_where_the_gripper_went():
    errors = []
    for episode in EPISODES:
        for step in range(5, episode.length - 21, 10):
            seen = observe(episode, step, 20)
            errors.append(np.linalg.norm(follow(seen.actions, seen)[20] - seen.positions[20]))
    assert np.mean(errors) < 0.03, "3 cm after a second"


def test_actions_of_nothing_lead_nowhere():
    seen = replace(observe(EPISODES[0], 0, 10), velocity=np.zeros(3))
    assert np.array_equal(follow(np.zeros((10, 7)), seen), np.repeat(seen.positions[:1], 11, axis=0))


def test_a_scene_without_a_known_camera_is_not_drawn_into():
    assert project(np.zeros((1, 3)), "somebody_s_kitchen") is None


def test_a_policy_s_chunk_follows_from_the_seed():
    policy = load(next(shown for shown in shown_models() if shown.acts))
    seen = observe(EPISODES[0], 20, 50)
    first, again, other = (predict(policy, seen, EPISODES[0].instruction, seed) for seed in (0, 0, 1))
    assert first.shape == (50, 7)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert gripper_closes(np.eye(7)).tolist() == [False] * 6 + [True]


@pytest.mark.slow
@pytest.mark.simulator
def test_the_geometry_is_the_simulator_s():
    pytest.importorskip("libero")
    import runpy

    recipe = runpy.run_path(str(FOLDER.parent / "recipes" / "libero_geometry.py"))
    stored = json.loads((FOLDER / "geometry.json").read_text())
    for suite, task in recipe["SCENES"][:2]:
        with recipe["LiberoEnvironment"](recipe["find_task"](suite, task)) as environment:
            name = environment.env_arguments["problem_name"]
            np.testing.assert_allclose(recipe["agent_view"](environment), stored["cameras"][name], atol=1e-5)
