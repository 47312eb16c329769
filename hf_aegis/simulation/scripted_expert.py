"""
A scripted pick-and-place policy for LIBERO that reads the simulator's ground truth: a source of demonstrations.

Measured on 2026-11-22 with mujoco 3.3.0, from five fixed initial states of each task:

| suite          | tasks | episodes | successes |
|----------------|------:|---------:|----------:|
| LIBERO-Object  |    10 |       50 |        50 |
| LIBERO-Spatial |    10 |       50 |        50 |
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hf_aegis.simulation.grasp_planning import Bounds, PickAndPlace, finger_axis, plan_into_basket, plan_onto_plate
from hf_aegis.simulation.libero_environment import GRIPPER_CLOSE, GRIPPER_OPEN, LiberoEnvironment


Planner = Callable[[Bounds, Bounds, list[Bounds]], PickAndPlace]

POSITION_PER_UNIT = 0.05
ROTATION_PER_UNIT = 0.5
GAIN = 1.6
"""Asking for more than the error makes up for the controller's lag; from 2 on the hand overshoots."""

RETREAT = 0.06
LONG_DROP = 0.2
STILL_FINGERS = 0.0006
"""Fingers that move less than this in a step, m, have closed on something."""


@dataclass(frozen=True)
class Waypoint:
    """
    A place for the hand to go, and what its fingers do on the way.

    Args:
        name (`str`): What happens here.
        position (`np.ndarray` of shape `(3,)`): Where the point between the fingertips shall be, world frame, m.
        gripper (`float`): -1 open, +1 closed.
        tolerance (`float`): The waypoint is reached within this distance, m.
        min_steps (`int`): Steps to spend at least, e.g. while fingers close.
        max_steps (`int`): Steps after which the next waypoint is taken anyway.
        until_still (`bool`): Whether to wait for the fingers to come to rest.
    """

    name: str
    position: np.ndarray
    gripper: float
    tolerance: float = 0.01
    min_steps: int = 0
    max_steps: int = 60
    until_still: bool = False


def waypoints(motion: PickAndPlace) -> list[Waypoint]:
    """
    The stations of a motion: hover, descend, close, lift, carry, lower, open, retreat; where the way down is long,
    `approach` before `lower`, which is given few steps because it may end by pressing on something.
    """
    above_grasp = motion.grasp + np.array([0.0, 0.0, motion.hover_height])
    lifted = np.array([motion.grasp[0], motion.grasp[1], motion.carry_height])
    above_release = np.array([motion.release[0], motion.release[1], motion.carry_height])
    away = motion.release + np.array([0.0, 0.0, RETREAT])
    stations = [
        Waypoint("hover", above_grasp, GRIPPER_OPEN, tolerance=0.02),
        Waypoint("descend", motion.grasp, GRIPPER_OPEN, tolerance=0.007, max_steps=30),
        Waypoint("close", motion.grasp, GRIPPER_CLOSE, tolerance=np.inf, min_steps=6, max_steps=14, until_still=True),
        Waypoint("lift", lifted, GRIPPER_CLOSE, tolerance=motion.lift_tolerance),
        Waypoint("carry", above_release, GRIPPER_CLOSE, tolerance=0.012),
        Waypoint("lower", motion.release, GRIPPER_CLOSE, tolerance=0.012, max_steps=20),
        Waypoint("open", motion.release, GRIPPER_OPEN, tolerance=np.inf, min_steps=5),
        Waypoint("retreat", away, GRIPPER_OPEN, tolerance=0.035, max_steps=10),
    ]
    if motion.carry_height - motion.release[2] > LONG_DROP:
        above = motion.release + np.array([0.0, 0.0, 0.08])
        stations.insert(5, Waypoint("approach", above, GRIPPER_CLOSE, tolerance=0.02, max_steps=40))
    return stations


def hand_down(yaw: float) -> np.ndarray:
    """Rotation `(3, 3)` of a hand that points straight down, turned by `yaw` rad about the vertical."""
    along = finger_axis(yaw)
    down = np.array([0.0, 0.0, -1.0])
    return np.stack([along, np.cross(down, along), down], axis=1)


def rotation_vector(rotation: np.ndarray) -> np.ndarray:
    """Axis times angle `(3,)`, rad, of a rotation matrix `(3, 3)` that turns by less than half a turn."""
    angle = np.arccos(np.clip((np.trace(rotation) - 1.0) / 2.0, -1.0, 1.0))
    axis = np.array(
        [
            rotation[2, 1] - rotation[1, 2],
            rotation[0, 2] - rotation[2, 0],
            rotation[1, 0] - rotation[0, 1],
        ]
    )
    # The axis comes times twice the sine; np.sinc divides safely at zero.
    return axis / (2.0 * np.sinc(angle / np.pi))


def steer(position: np.ndarray, rotation: np.ndarray, target: np.ndarray, target_rotation: np.ndarray) -> np.ndarray:
    """
    The motion part of an action: proportional to the error, within the controller's limits.

    Args:
        position (`np.ndarray` of shape `(3,)`): Where the hand is, m.
        rotation (`np.ndarray` of shape `(3, 3)`): How it is turned.
        target (`np.ndarray` of shape `(3,)`): Where it shall be.
        target_rotation (`np.ndarray` of shape `(3, 3)`): How it shall be turned.

    Returns:
        `np.ndarray` of shape `(6,)`: Translation and rotation in [-1, 1].
    """
    translation = GAIN * (target - position) / POSITION_PER_UNIT
    turn = rotation_vector(target_rotation @ rotation.T) / ROTATION_PER_UNIT
    return np.clip(np.concatenate([translation, turn]), -1.0, 1.0)


def plan(environment: LiberoEnvironment) -> PickAndPlace:
    """
    Read a motion off the simulator.

    Raises:
        `ValueError`: If the task's goal is not one object in a basket or on a plate.
    """
    goal = environment.goal
    if len(goal) == 1 and goal[0][0] == "in" and goal[0][2].endswith("_contain_region"):
        planner: Planner = plan_into_basket
        destination = goal[0][2].removesuffix("_contain_region")
    elif len(goal) == 1 and goal[0][0] == "on" and goal[0][2].startswith("plate"):
        planner, destination = plan_onto_plate, goal[0][2]
    else:
        raise ValueError(
            "The scripted expert puts one object into a basket or onto a plate (LIBERO-Object, LIBERO-Spatial); "
            f"{environment.task.name} asks for {goal}."
        )
    target = goal[0][1]
    obstacles = [environment.bounds(name) for name in environment.objects if name != target]
    return planner(environment.bounds(target), environment.bounds(destination), obstacles)


class ScriptedExpert:
    """
    Scripted policy for the tasks of LIBERO-Object ("place it in the basket") and LIBERO-Spatial ("place it on the
    plate").

    Args:
        environment ([`LiberoEnvironment`]): The simulator, freshly reset.
        generator (`np.random.Generator`, *optional*):
            Varies the path a little, so that demonstrations differ by more than their start; without it the motion is
            a function of the start.

    Raises:
        `ValueError`: If the task's goal is not one object in a basket or on a plate.
    """

    def __init__(self, environment: LiberoEnvironment, generator: np.random.Generator | None = None):
        self.environment = environment
        self._variation = None if generator is None else int(generator.integers(2**31))
        self._look()
        self._current = 0
        self._steps = 0
        self._fingers = np.zeros(2)

    @property
    def finished(self) -> bool:
        """Whether the last waypoint has been reached."""
        return self._current == len(self.waypoints)

    @property
    def phase(self) -> str:
        """Name of the waypoint under way."""
        return "finished" if self.finished else self.waypoints[self._current].name

    def act(self) -> np.ndarray | None:
        """The next action `(7,)` in [-1, 1] with a gripper of ±1; `None` once the motion is finished."""
        proprioception = self.environment.proprioception()
        position, fingers = proprioception["ee_pos"], proprioception["gripper_states"]
        moving = np.abs(fingers - self._fingers).max() > STILL_FINGERS
        self._fingers = fingers
        while not self.finished:
            waypoint = self.waypoints[self._current]
            reached = np.linalg.norm(waypoint.position - position) < waypoint.tolerance
            waiting = self._steps < waypoint.min_steps or (waypoint.until_still and moving)
            if (reached and not waiting) or self._steps >= waypoint.max_steps:
                if waypoint.name == "hover":
                    # Objects may still have been settling when the motion was planned.
                    self._look()
                self._current += 1
                self._steps = 0
                continue
            self._steps += 1
            motion = steer(position, self.environment.hand_rotation(), waypoint.position, self.rotation)
            return np.append(motion, waypoint.gripper)
        return None

    def _look(self) -> None:
        motion = plan(self.environment)
        if self._variation is not None:
            motion = motion.varied(np.random.default_rng(self._variation))
        self.waypoints = waypoints(motion)
        self.rotation = hand_down(motion.yaw)
