"""Policies that check simulator and conventions rather than a model: the expert, a replay, and doing nothing."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_aegis.data.libero_files import find_data_groups, naming_damage, open_libero_file, resolve_files
from hf_aegis.data.libero_format import LiberoFormatError
from hf_aegis.data.libero_hdf5 import RecordedTask, read_task
from hf_aegis.evaluation.rollouts.policy import Observation, Policy
from hf_aegis.simulation.libero_environment import ACTION_DIMENSION, GRIPPER_OPEN
from hf_aegis.simulation.scripted_expert import ScriptedExpert


class ScriptedPolicy:
    """
    The [`~simulation.ScriptedExpert`] as a policy: one action at a time, from the simulator's ground truth.

    Args:
        environment ([`~simulation.LiberoEnvironment`]): The simulator it acts in.
    """

    cameras: Sequence[str] = ()

    def __init__(self, environment: Any):
        self._environment = environment
        self._expert: ScriptedExpert | None = None

    def reset(self, instruction: str, seed: int = 0) -> None:
        """
        Plans the motion from how the simulator stands now; what is to be done is read there, not in the instruction.

        Raises:
            ValueError: If the task is none that the expert can do.
        """
        self._expert = ScriptedExpert(self._environment)

    def act(self, observation: Observation) -> np.ndarray:
        """The next action, `(1, 7)`, or none."""
        if self._expert is None:
            raise ValueError("act was called before reset: the expert has no plan")
        action = self._expert.act()
        return np.empty((0, ACTION_DIMENSION)) if action is None else action[None]


class ReplayPolicy:
    """
    A demonstration's actions, one after the other, whatever is seen.

    Args:
        actions (`np.ndarray` of shape `(T, 7)`): As recorded.
    """

    cameras: Sequence[str] = ()

    def __init__(self, actions: np.ndarray):
        self._actions = actions

    def reset(self, instruction: str, seed: int = 0) -> None:
        """There is nothing to be told."""

    def act(self, observation: Observation) -> np.ndarray:
        """What is left of the recorded actions."""
        return self._actions[observation.step :]


class ZeroPolicy:
    """No motion, and an open gripper: the success rate of doing nothing."""

    cameras: Sequence[str] = ()

    def reset(self, instruction: str, seed: int = 0) -> None:
        """There is nothing to be told."""

    def act(self, observation: Observation) -> np.ndarray:
        """Fifty idle actions."""
        return np.tile([0.0] * (ACTION_DIMENSION - 1) + [GRIPPER_OPEN], (50, 1))


@dataclass(frozen=True)
class RecordedStart:
    """
    Where a demonstration began and what it did.

    Args:
        state (`np.ndarray` of shape `(state_dim,)`): The flattened MuJoCo state.
        seed (`int`, *optional*): Of the fixtures' poses; released files have none.
        actions (`np.ndarray` of shape `(T, 7)`): What was done.
    """

    state: np.ndarray
    seed: int | None
    actions: np.ndarray


def recorded_tasks(paths: Sequence[str | Path]) -> Iterator[RecordedTask]:
    """
    The tasks in LIBERO HDF5 files; a folder stands for all files below it.

    Raises:
        FileNotFoundError: If a path does not exist.
        LiberoFormatError: If a file is not what it should be.
    """
    for path in resolve_files([str(path) for path in paths]):
        with open_libero_file(path) as file, naming_damage(path):
            for group in find_data_groups(file):
                task = read_task(group)
                assert task is not None  # the strict report raises instead
                yield task


def recorded_start(file: str, path: str) -> RecordedStart:
    """
    Reads what a replay needs of the demonstration at an HDF5 path.

    Raises:
        LiberoFormatError: If its first state was not recorded.
    """
    with open_libero_file(file) as opened, naming_damage(file):
        group = opened[path]
        if "init_state" not in group.attrs:
            raise LiberoFormatError.at(file, f"{path}@init_state", "missing: the demonstration cannot be replayed")
        seed = group.attrs.get("reset_seed")
        return RecordedStart(
            state=np.asarray(group.attrs["init_state"], dtype=np.float64),
            seed=None if seed is None else int(seed),
            actions=group["actions"][()].astype(np.float64),
        )


LocalPolicy = Callable[[Any, tuple[str, str] | None], Policy]
"""Makes a policy that acts beside the simulator, from the environment and the demonstration to be replayed."""


def scripted_policy(environment: Any, demonstration: tuple[str, str] | None) -> Policy:
    """The scripted expert, as a [`LocalPolicy`]."""
    return ScriptedPolicy(environment)


def replay_policy(environment: Any, demonstration: tuple[str, str] | None) -> Policy:
    """A demonstration's replay, as a [`LocalPolicy`]."""
    if demonstration is None:
        raise ValueError("the episode names no demonstration to replay")
    return ReplayPolicy(recorded_start(*demonstration).actions)


def zero_policy(environment: Any, demonstration: tuple[str, str] | None) -> Policy:
    """Doing nothing, as a [`LocalPolicy`]."""
    return ZeroPolicy()
