"""Moments of recorded LIBERO demonstrations: what the robot saw, and what the demonstrator did next."""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hf_aegis.data.libero_files import find_data_groups, naming_damage, open_libero_file
from hf_aegis.data.libero_format import CAMERAS, LiberoConvention, text_attribute
from hf_aegis.data.libero_frames import frames_key, read_frame
from hf_aegis.data.libero_hdf5 import read_demonstration, read_task
from hf_aegis.json_files import parse_json_object


@dataclass(frozen=True)
class Episode:
    """
    A demonstration that none of the shown policies was trained on.

    Args:
        file (`Path`), path (`str`): Where it is.
        suite (`str`), instruction (`str`): LIBERO's suite and the task.
        scene (`str`): LIBERO's name of the scene, which says where its camera stands.
        convention (`LiberoConvention`): How its frames are stored.
        length (`int`): Observations that an action was taken upon.
    """

    file: Path
    path: str
    suite: str
    instruction: str
    scene: str
    convention: LiberoConvention
    length: int


@dataclass(frozen=True)
class Observation:
    """
    A moment of an episode, and what came next.

    Args:
        images (`list[np.ndarray]`): Of the cameras, in the order of training: upright `(s, s, 3)` uint8.
        state (`np.ndarray` of shape `(9,)`): Joint positions and gripper fingers.
        actions (`np.ndarray` of shape `(n, 7)`): The demonstrator's next actions, in robot units.
        positions (`np.ndarray` of shape `(m, 3)`): Where the gripper is now and was then, in m; at most n + 1.
        velocity (`np.ndarray` of shape `(3,)`): How far it came with the last action, in m.
    """

    images: list[np.ndarray]
    state: np.ndarray
    actions: np.ndarray
    positions: np.ndarray
    velocity: np.ndarray


@functools.cache
def held_out_episodes(file: Path) -> list[Episode]:
    """The last demonstration of each task, which is the one that training leaves out."""
    episodes = []
    with open_libero_file(file) as opened, naming_damage(file):
        for group in find_data_groups(opened):
            task = read_task(group)
            path = task.demonstrations[-1]
            about = parse_json_object(
                text_attribute(group.attrs, "problem_info"), f"{file}: {group.name}: problem_info"
            )
            episodes.append(
                Episode(
                    file=file,
                    path=path,
                    suite=task.suite or "",
                    instruction=task.instruction,
                    scene=about.get("problem_name", ""),
                    convention=task.convention,
                    length=len(opened[path]["actions"]) - task.convention.action_offset,
                )
            )
    return episodes


def observe(episode: Episode, step: int, horizon: int) -> Observation:
    """
    What is seen at a step of an episode, and the next `horizon` actions, fewer at its end.

    Raises:
        ValueError: `step` lies outside of the episode.
    """
    if not 0 <= step < episode.length:
        raise ValueError(f"step must be from 0 to {episode.length - 1}, found {step}")
    with open_libero_file(episode.file) as file, naming_damage(episode.file):
        group = file[episode.path]
        recorded = read_demonstration(group, episode.convention, CAMERAS)
        images = [
            read_frame(group[f"obs/{frames_key(camera, episode.convention)}"], step, episode.convention)
            for camera in CAMERAS
        ]
        positions = group["obs/ee_pos"][max(step - 1, 0) : step + horizon + 1]
    first = step + episode.convention.action_offset
    return Observation(
        images=images,
        state=recorded.state[step],
        actions=recorded.actions[first : first + horizon],
        positions=positions[min(step, 1) :],
        velocity=positions[1] - positions[0] if step > 0 else np.zeros(3),
    )
