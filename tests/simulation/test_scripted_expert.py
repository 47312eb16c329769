from dataclasses import replace

import numpy as np
import pytest

from hf_aegis.simulation.grasp_planning import PickAndPlace
from hf_aegis.simulation.libero_environment import LiberoEnvironment
from hf_aegis.simulation.libero_tasks import find_task
from hf_aegis.simulation.scripted_expert import ScriptedExpert, hand_down, rotation_vector, steer, waypoints


MOTION = PickAndPlace(
    grasp=np.array([0.1, -0.1, 0.05]), release=np.array([0.0, 0.25, 0.12]), carry_height=0.25, hover_height=0.08
)


def rodrigues(vector):
    angle = np.linalg.norm(vector)
    if angle == 0:
        return np.eye(3)
    x, y, z = vector / angle
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def test_waypoints_of_a_motion():
    stations = waypoints(MOTION)
    names = [station.name for station in stations]
    assert names == ["hover", "descend", "close", "lift", "carry", "lower", "open", "retreat"]
    place = {station.name: station.position for station in stations}
    assert place["hover"] == pytest.approx([0.1, -0.1, 0.13])
    assert place["lift"] == pytest.approx([0.1, -0.1, 0.25])
    assert place["carry"] == pytest.approx([0.0, 0.25, 0.25])
    assert place["retreat"][2] > place["lower"][2]
    closed = [station.name for station in stations if station.gripper == 1]
    assert closed == ["close", "lift", "carry", "lower"]


def test_a_long_way_down_has_a_station_more():
    names = [station.name for station in waypoints(replace(MOTION, carry_height=0.4))]
    assert names[4:7] == ["carry", "approach", "lower"]


@pytest.mark.parametrize("vector", [[0, 0, 0], [1e-9, 0, 0], [0.3, -0.2, 0.9], [0, 2.5, 0], [-1.0, 1.0, 1.0]])
def test_rotation_vector_inverts_rodrigues_formula(vector):
    assert rotation_vector(rodrigues(np.array(vector, dtype=float))) == pytest.approx(vector, abs=1e-7)


@pytest.mark.parametrize("yaw", [0.0, 0.4, -1.2])
def test_hand_down_is_a_rotation_that_points_down(yaw):
    rotation = hand_down(yaw)
    assert rotation @ rotation.T == pytest.approx(np.eye(3), abs=1e-12)
    assert np.linalg.det(rotation) == pytest.approx(1.0)
    assert rotation[:, 2] == pytest.approx([0, 0, -1])
    assert rotation[:, 0] == pytest.approx([-np.sin(yaw), np.cos(yaw), 0])


def test_steering_is_still_at_the_target_points_towards_it_and_saturates():
    position, rotation = np.array([0.1, 0.2, 0.3]), hand_down(0.0)
    assert steer(position, rotation, position, rotation) == pytest.approx(np.zeros(6))
    near = steer(
        position, rotation, position + np.array([0.01, 0.0, -0.005]), rodrigues(np.array([0, 0, 0.1])) @ rotation
    )
    assert near[0] > 0 > near[2]
    assert near[0] == pytest.approx(-2 * near[2])
    assert near[3:] == pytest.approx([0, 0, 0.2])
    far = steer(position, rotation, position + np.array([1.0, -1.0, 0.0]), rotation)
    assert far[:2] == pytest.approx([1.0, -1.0])


class PointMass:
    """A hand that goes where it is told and fingers that follow; enough to run the expert through its stations."""

    goal = (("in", "milk_1", "basket_1_contain_region"),)
    objects = ("milk_1", "basket_1")

    def __init__(self):
        self.place, self.fingers = np.array([-0.15, 0.0, 0.3]), 0.04
        self.actions = []

    def bounds(self, name):
        centre = {"milk_1": [0.05, -0.1, 0.065], "basket_1": [0.0, 0.26, 0.07]}[name]
        half = {"milk_1": [0.026, 0.026, 0.065], "basket_1": [0.08, 0.085, 0.07]}[name]
        return np.array(centre) - half, np.array(centre) + half

    def hand_rotation(self):
        return hand_down(0.0)

    def proprioception(self):
        return {"ee_pos": self.place.copy(), "gripper_states": np.array([self.fingers, -self.fingers])}

    def step(self, action):
        self.actions.append(action)
        self.place = self.place + 0.015 * action[:3]
        self.fingers = float(np.clip(self.fingers - 0.005 * action[6], 0.02, 0.04))


@pytest.mark.parametrize("seed", [None, 0])
def test_the_expert_visits_its_stations_in_order_and_ends(seed):
    world = PointMass()
    expert = ScriptedExpert(world, None if seed is None else np.random.default_rng(seed))
    phases = []
    while (action := expert.act()) is not None:
        phases.append(expert.phase)
        world.step(action)
        assert len(phases) < 200
    assert list(dict.fromkeys(phases)) == [
        "hover", "descend", "close", "lift", "carry", "lower", "open", "retreat",
    ]  # fmt: skip
    actions = np.array(world.actions)
    assert np.abs(actions).max() <= 1
    assert set(actions[:, 6]) == {-1.0, 1.0}
    assert expert.phase == "finished"
    assert expert.act() is None


def test_other_goals_are_refused():
    world = PointMass()
    world.goal = (("open", "wooden_cabinet_1_top_region"),)
    world.task = type("Task", (), {"name": "open_the_top_drawer"})
    with pytest.raises(ValueError, match="open_the_top_drawer asks for"):
        ScriptedExpert(world)


TASKS = [(suite, index) for suite in ("libero_object", "libero_spatial") for index in range(10)]


@pytest.mark.slow
@pytest.mark.simulator
@pytest.mark.parametrize(("suite", "index"), TASKS, ids=lambda value: str(value))
def test_the_expert_solves_every_task_from_a_fixed_start(suite, index):
    pytest.importorskip("libero")
    from hf_aegis.data.libero_recorder import MAX_EPISODE_STEPS

    with LiberoEnvironment(find_task(suite, index)) as environment:
        environment.reset(init_state=0)
        assert not environment.check_success()
        expert = ScriptedExpert(environment)
        for _ in range(MAX_EPISODE_STEPS + 1):
            if (action := expert.act()) is None:
                break
            environment.step(action)
        assert expert.finished, f"still at {expert.phase} after {MAX_EPISODE_STEPS} steps"
        assert environment.check_success()


@pytest.mark.simulator
def test_the_tasks_with_a_flat_box_and_a_drawer_are_among_those():
    pytest.importorskip("libero")
    names = [find_task(suite, index).name for suite, index in TASKS]
    assert len(set(names)) == 20
    assert "pick_up_the_cream_cheese_and_place_it_in_the_basket" in names
    assert any("in_the_top_drawer_of_the_wooden_cabinet" in name for name in names)
