"""LIBERO-plus: what its names say, which variants are drawn, what is read of its files, and what the table counts."""

import importlib
import json
import os
import pickle
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch


RECIPES = Path(__file__).parents[2] / "recipes"
SOUP = "pick_up_the_alphabet_soup_and_place_it_in_the_basket"


@pytest.fixture(scope="module")
def launcher():
    """The recipe as a module: recipes are scripts, not a package. A script finds its neighbours by the search path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(RECIPES)
        yield importlib.import_module("libero_plus")


@pytest.fixture(scope="module")
def client(launcher):
    return sys.modules["libero_plus_client"]


@pytest.mark.parametrize(
    ("name", "kind", "instruction", "start", "noise"),
    [
        (f"{SOUP}_view_0_0_100_2_4_initstate_0", "camera", "pick up the alphabet soup", f"libero_object/{SOUP}", 0),
        (f"{SOUP}_view_0_0_100_0_0_initstate_11", "initial_state", "pick up the", f"libero_object/{SOUP}", 0),
        (f"{SOUP}_view_0_0_100_0_0_initstate_0_noise_23", "noise", "pick up the", f"libero_object/{SOUP}", 23),
        (f"{SOUP}_language_2_view_0_0_100_0_0_initstate_0", "language", "", f"libero_object/{SOUP}", 0),
        (
            f"{SOUP}_level1_sample2",
            "layout",
            "pick up the alphabet soup and place it in the basket",
            f"libero_newobj/libero_object/{SOUP}_level1_sample2",
            0,
        ),
        (
            "open_the_middle_drawer_moved_level1_sample1",
            "layout",
            "open the middle drawer",
            "libero_newobj/libero_object/open_the_middle_drawer_moved_level1_sample1",
            0,
        ),
        (
            "KITCHEN_SCENE3_turn_on_the_stove_view_0_0_122_0_0_initstate_0",
            "camera",
            "turn on the stove",
            "libero_object/KITCHEN_SCENE3_turn_on_the_stove",
            0,
        ),
        (
            "pick_up_the_black_bowl_from_table_center_view_0_0_122_0_0_initstate_0",
            "camera",
            "pick up the black bowl from table center",
            "libero_object/pick_up_the_black_bowl_from_table_center",
            0,
        ),
    ],
)
def test_names(client, name, kind, instruction, start, noise):
    variant = client.parse(name, "libero_object")
    assert (variant.file, variant.kind, variant.noise) == (name, kind, noise)
    assert variant.start == f"{start}.pruned_init"
    assert variant.instruction.startswith(instruction) and bool(variant.instruction) == bool(instruction)
    assert "view" not in variant.instruction and "level" not in variant.instruction


@pytest.mark.parametrize("ending", ["_light_1", "_add_10", "_table_1", "_tb_12", "", "_view_0_0_100_0_0_initstate_0"])
def test_what_needs_other_assets_or_is_undisturbed_is_left_out(client, ending):
    assert client.parse(SOUP + ending, "libero_object") is None


def test_the_same_variants_are_drawn_whichever_kinds_are_asked_for(client):
    variants = [client.Variant(f"{kind} {index}", kind, "", "") for kind in client.KINDS for index in range(20)]
    all_kinds = client.choose(variants, list(client.KINDS), 4, seed=7)
    assert Counter(variant.kind for variant in all_kinds) == dict.fromkeys(client.KINDS, 4)
    noise = client.choose(variants, ["noise"], 4, seed=7)
    assert [variant for variant in all_kinds if variant.kind == "noise"] == noise
    assert client.choose(variants, ["noise"], 2, seed=7) == noise[:2]
    assert client.choose(variants, ["noise"], 4, seed=8) != noise
    assert len(client.choose(variants, ["noise"], 100, seed=7)) == 20


def test_initial_states_are_read_without_torch(client, tmp_path):
    states = np.arange(12.0).reshape(3, 4)
    for values in (states, states[0]):
        torch.save(values, tmp_path / "start.pruned_init")
        np.testing.assert_array_equal(client.read_start(tmp_path / "start.pruned_init"), states[0])


def test_initial_states_run_no_code(client, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save(Bomb(), tmp_path / "start.pruned_init")
    with pytest.raises(pickle.UnpicklingError, match=r"expected an array, found (posix|os)\.mkdir"):
        client.read_start(tmp_path / "start.pruned_init")
    assert not (tmp_path / "ran").exists()


def test_a_file_holds_episodes_of_the_same_settings(launcher, tmp_path):
    settings = {
        "suite": "libero_object",
        "seed": 7,
        "replan_steps": 5,
        "max_steps": 280,
        "rendering": "fast",
        "per_kind": 3,
        "port": 8000,
    }
    output = tmp_path / "new" / "episodes.jsonl"
    launcher.begin(output, settings)
    first = output.read_text()
    # More variants go on in the same file, of another server too.
    launcher.begin(output, settings | {"per_kind": 9, "port": 9000})
    assert output.read_text() == first
    # What a killed process left of a line is dropped, so that the next one begins a line.
    output.write_text(first + '{"variant": "a"}\n{"variant": "b", "ki')
    launcher.begin(output, settings)
    assert output.read_text() == first + '{"variant": "a"}\n'
    with pytest.raises(ValueError, match="give another --output"):
        launcher.begin(output, settings | {"seed": 8})


def test_a_file_holds_episodes_of_one_model(client, tmp_path):
    output = tmp_path / "episodes.jsonl"
    assert client.same_model([], {"model": "a"}, output) == "a"
    assert client.same_model([{"variant": "x", "model": "a"}], {"model": "a"}, output) == "a"
    # Other servers say nothing of theirs.
    assert client.same_model([{"variant": "x"}], {}, output) is None
    with pytest.raises(SystemExit, match="holds episodes of the model a, served is b: give another --output"):
        client.same_model([{"variant": "x", "model": "a"}], {"model": "b"}, output)


def test_errors_are_counted_apart(launcher, tmp_path):
    episodes = [
        {"variant": "a", "kind": "camera", "success": True},
        {"variant": "b", "kind": "camera", "error": "tried again below"},
        {"variant": "b", "kind": "camera", "success": False},
        {"variant": "c", "kind": "camera", "error": "MujocoException: ..."},
        {"variant": "d", "kind": "noise", "error": "motion blur"},
    ]
    output = tmp_path / "episodes.jsonl"
    output.write_text("\n".join(json.dumps(line) for line in [{"suite": "libero_object"}, *episodes]) + "\n")
    rows = {line.split()[0]: line.split()[1:] for line in launcher.table(output).splitlines()[1:]}
    assert rows["camera"] == ["1", "/", "2", "9.5", "–", "90.5", "1"]
    assert rows["noise"] == ["0", "/", "0", "-", "1"]
    assert rows["all"] == ["1", "/", "2", "9.5", "–", "90.5", "2"]
    assert "language" not in rows


class Scripted:
    """A simulator that succeeds at a step, and a server that answers with numbered actions."""

    def __init__(self, success_at):
        self.success_at, self.taken, self.asked = success_at, [], 0

    def observe(self):
        return {"prompt": "go"}

    def step(self, action):
        self.taken.append(int(action[0]))
        return len(self.taken) == self.success_at

    def infer(self, observation):
        self.asked += 1
        return {"actions": np.arange(10 * self.asked, 10 * self.asked + 6)[:, None].repeat(7, axis=1)}


def test_an_episode_replans_and_ends(client):
    world = Scripted(success_at=5)
    assert client.run_episode(world, world, max_steps=9, replan_steps=3) == (True, 5)
    assert world.taken == [10, 11, 12, 20, 21]
    world = Scripted(success_at=None)
    assert client.run_episode(world, world, max_steps=4, replan_steps=50) == (False, 4)
    assert world.asked == 1


def test_a_server_that_is_gone_is_no_error_of_an_episode(client, monkeypatch):
    class Gone:
        def infer(self, observation):
            raise ConnectionError("closed")

    with pytest.raises(client.ServerError, match="the policy server: closed"):
        client.run_episode(Scripted(1), Gone(), 4, 1)
    settings = {"suite": "libero_object", "rendering": "fast", "max_steps": 4, "replan_steps": 1}
    variant = client.Variant("x", "camera", "go", "x")

    class World(Scripted):
        instruction = "go"

        def __init__(self, *arguments):
            super().__init__(1)

        def close(self):
            self.closed = True

    monkeypatch.setattr(client, "Simulator", World)
    with pytest.raises(client.ServerError):
        client.attempt(None, Path(), variant, Gone(), settings)
    assert client.attempt(None, Path(), variant, Scripted(1), settings)["success"]
    monkeypatch.setattr(World, "step", lambda self, action: (_ for _ in ()).throw(RuntimeError("unstable")))
    assert client.attempt(None, Path(), variant, Scripted(1), settings) == {"error": "RuntimeError: unstable"}
