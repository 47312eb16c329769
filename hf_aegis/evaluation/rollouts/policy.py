"""What a policy is to rollouts and to a server: told an instruction, it turns observations into actions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np


FEATURE_WIDTHS = {
    "joint_states": 7,
    "gripper_states": 2,
    "ee_pos": 3,
    "ee_ori": 3,
    "ee_states": 6,
    "robot_states": 9,
}
"""Proprioception by LIBERO's names, as of [`~simulation.LiberoEnvironment.proprioception`]."""


@dataclass(frozen=True)
class Observation:
    """
    What a policy sees at one moment.

    Args:
        images (`Mapping[str, np.ndarray]`):
            By LIBERO's names (`agentview_rgb`, `eye_in_hand_rgb`), upright pictures `(h, w, 3)`, uint8, row 0 at the
            top. Empty for a policy that does not look.
        proprioception (`Mapping[str, np.ndarray]`):
            The robot's own state by LIBERO's names: `joint_states` (7,) in rad, `gripper_states` (2,) in m, `ee_pos`
            (3,) in m, `ee_ori` (3,) axis-angle in rad. A policy takes of them what it was trained on.
        step (`int`, *optional*, defaults to `0`): Actions executed since the episode began.
    """

    images: Mapping[str, np.ndarray] = field(default_factory=dict)
    proprioception: Mapping[str, np.ndarray] = field(default_factory=dict)
    step: int = 0


@dataclass(frozen=True)
class PolicyRequest:
    """
    One episode's question to a policy that serves several at a time; all that the answer depends on.

    Args:
        instruction (`str`): What the robot was told.
        observation ([`Observation`]): What is seen now.
        seed (`int`, *optional*, defaults to `0`): The episode's, of whatever the policy draws.
    """

    instruction: str
    observation: Observation
    seed: int = 0


class PolicyError(ValueError):
    """A policy answered with what no robot can execute: an episode's failure, by the policy's own fault."""


class Policy(Protocol):
    """
    A policy in one episode.

    Attributes:
        cameras (`Sequence[str]`): The images it looks at; no others are rendered.
    """

    @property
    def cameras(self) -> Sequence[str]: ...

    def reset(self, instruction: str, seed: int = 0) -> None:
        """Begins an episode. What the policy draws in it follows from the seed."""

    def act(self, observation: Observation) -> np.ndarray:
        """
        The next actions, as the simulator takes them.

        Returns:
            `np.ndarray` of shape `(H, 7)`: translation, rotation, gripper (-1 opens, +1 closes), meant for [-1, 1],
            to which LIBERO's controller clips them; with `H = 0` the policy has nothing more to do, which ends the
            episode.
        """


class BatchedPolicy(Protocol):
    """
    A policy that keeps no episode's state, so that one serves any number of them side by side.

    Attributes:
        cameras (`Sequence[str]`): The images it looks at.
    """

    @property
    def cameras(self) -> Sequence[str]: ...

    def act_together(self, requests: Sequence[PolicyRequest]) -> list[np.ndarray | PolicyError]:
        """For each request the chunk `(H, 7)`, as of [`Policy.act`], or what is wrong with it."""


def checked_chunk(actions: np.ndarray, width: int = 7) -> np.ndarray:
    """
    A chunk as float64, after a check that it can be executed.

    Raises:
        PolicyError: If it is not of shape `(H, width)`, or a value is not finite.
    """
    actions = np.asarray(actions)
    if actions.ndim != 2 or actions.shape[1] != width:
        raise PolicyError(f"a chunk of actions has shape (H, {width}), found {actions.shape}")
    actions = actions.astype(np.float64)
    if not np.isfinite(actions).all():
        step, column = np.argwhere(~np.isfinite(actions))[0].tolist()
        raise PolicyError(f"action {step} of the chunk is {actions[step, column]} in column {column}")
    return actions
