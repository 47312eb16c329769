"""LIBERO demonstrations as a map-style dataset of (images, state, instruction) -> action chunk."""

import bisect
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import h5py
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from hf_aegis.data.libero_files import find_data_groups, naming_damage, open_libero_file, resolve_files
from hf_aegis.data.libero_format import (
    ACTION_DIMENSION,
    CAMERAS,
    IMAGE_ORIGINS,
    OBSERVATIONS,
    STATE_DIMENSION,
    STATE_FEATURES,
    LiberoConvention,
    LiberoFormatError,
)
from hf_aegis.data.libero_frames import frames_key, read_frame
from hf_aegis.data.libero_hdf5 import Demonstration, RecordedTask, read_demonstration, read_task
from hf_aegis.data.libero_pictures import PictureSettings, common_pictures, read_pictures
from hf_aegis.data.statistics import load_statistics
from hf_aegis.functional.normalization import DatasetStatistics, FeatureStatistics, normalize


SPLITS = ("train", "held_out", "all")

# Most datasets of frames that a process keeps open: about 80 MB of HDF5's own buffers.
_OPEN_FRAMES = 2048


@dataclass(frozen=True)
class _Episode:
    """A demonstration the dataset reads from: `length` samples, the observations that have an action upon them."""

    file: str
    path: str
    instruction: str
    convention: LiberoConvention
    length: int


class LiberoDataset(Dataset):
    """
    One item per observation of every selected demonstration.

    An item is a dictionary: `images`, a list of uint8 arrays `(s, s, 3)` in the order of `cameras`, upright; `state`,
    float32 `(9,)`, joint positions then gripper fingers; `actions`, float32 `(H, 7)`, the chunk that starts upon this
    observation; `action_is_pad`, bool `(H,)`, true past the end of the demonstration; `instruction`, a string.

    A chunk that reaches past the end is padded by repeating the last action. Where a file holds observations taken
    *after* each action (LIBERO's released files), observation `t` is paired with the actions from `t + 1` on, so that
    a demonstration of `T` steps gives `T - 1` items.

    Constructing the dataset reads and checks every action and state once, and no image. What items need of them stays
    in memory (64 bytes a step); of the files, items read their own frames only. File handles are opened per process,
    so the dataset works in forked and spawned `DataLoader` workers, and what they lead to stays open.

    Args:
        paths (`str`, `os.PathLike` or a sequence of them): HDF5 files, released, recorded or combined; a folder
            stands for every `*.hdf5` below it.
        chunk_size (`int`, *optional*, defaults to `50`): `H`, actions per chunk.
        cameras (`Sequence[str]`, *optional*): datasets under `obs`, without the suffix of JPEG ones.
        image_size (`int`, *optional*): side to which frames are resized (bilinear); as stored by default.
        image_origin (`str`, *optional*, defaults to `"auto"`): `"top_left"` or `"bottom_left"` overrides what the file
            says.
        observation (`str`, *optional*, defaults to `"auto"`): `"before_action"` or `"after_action"` overrides what the
            file says. Files that say nothing are taken for released ones, i.e. `"after_action"`.
        statistics (`DatasetStatistics` or path to its JSON, *optional*): what items are normalised with. By default
            computed over every time step that items draw on; for `split="held_out"` over the train split.
        normalize (`bool`, *optional*, defaults to `True`): map states and actions to [-1, 1], clipped.
        split (`str`, *optional*, defaults to `"all"`): `"train"`, `"held_out"` or `"all"`.
        held_out_per_task (`int`, *optional*, defaults to `1`): the last so many demonstrations of every task form the
            held-out split.
        instructions (`Sequence[str]`, *optional*): keep only the tasks with these instructions.
        short_demonstrations (`str`, *optional*, defaults to `"error"`): what becomes of a demonstration with fewer
            actions than a chunk: `"error"` refuses it, `"pad"` accepts it (all its chunks are padded).

    Attributes:
        statistics (`DatasetStatistics`): what items are (or would be) normalised with.
        fingerprint (`str`): SHA-256 over the selected demonstrations' actions, states, lengths, frame sizes,
            instructions and conventions, in order. It covers neither pixels nor file names: the same demonstrations in
            one combined file or in several give the same fingerprint.
        instructions (`list[str]`): distinct instructions, in order of appearance.
        state_features (`tuple[str, ...]`): the proprioception that makes up the state, in order.
        pictures (`PictureSettings`, *optional*): how the items' images were rendered; `None` where files do not say
            or differ, or images are resized here.

    Raises:
        FileNotFoundError: a path does not exist.
        LiberoFormatError: a file is not what it should be; the message names the file, the place and the remedy.
        ValueError: an argument is not allowed, or the selection is empty.
    """

    def __init__(
        self,
        paths: str | os.PathLike | Sequence[str | os.PathLike],
        chunk_size: int = 50,
        cameras: Sequence[str] = CAMERAS,
        image_size: int | None = None,
        image_origin: str = "auto",
        observation: str = "auto",
        statistics: DatasetStatistics | str | os.PathLike | None = None,
        normalize: bool = True,
        split: str = "all",
        held_out_per_task: int = 1,
        instructions: Sequence[str] | None = None,
        short_demonstrations: str = "error",
    ):
        _require_choice("image_origin", image_origin, ("auto", *IMAGE_ORIGINS))
        _require_choice("observation", observation, ("auto", *OBSERVATIONS))
        _require_choice("split", split, SPLITS)
        _require_choice("short_demonstrations", short_demonstrations, ("error", "pad"))
        _require_positive("chunk_size", chunk_size)
        if split != "all":
            _require_positive("held_out_per_task", held_out_per_task)
        if image_size is not None:
            _require_positive("image_size", image_size)
        if isinstance(cameras, str) or not cameras:
            raise ValueError(f"'cameras' must be a non-empty sequence of names, found {cameras!r}")
        if isinstance(instructions, str):
            raise ValueError(f"'instructions' must be a sequence of strings, found the string {instructions!r}")
        if statistics is not None and not isinstance(statistics, DatasetStatistics):
            statistics = load_statistics(statistics)
        if statistics is not None:
            _require_dimensions(statistics)

        self.chunk_size = chunk_size
        self.cameras = tuple(cameras)
        self.state_features = tuple(STATE_FEATURES)
        self.image_size = image_size
        self.normalize = normalize
        self._handles: dict[str, h5py.File] = {}
        self._frames: dict[tuple[str, str], h5py.Dataset] = {}
        self._handles_pid = os.getpid()
        self._stamps: dict[str, tuple[int, int]] = {}
        self._episodes: list[_Episode] = []

        files = resolve_files(paths)
        tasks = _select(_read_tasks(files, image_origin, observation), instructions)
        self._stamps = {file: _stamp(file) for file in files}
        try:
            training, chosen, self.fingerprint = self._scan(tasks, split, held_out_per_task)
            self.pictures = self._pictures(tasks)
        finally:
            self._close()
        if short_demonstrations == "error":
            self._refuse_short()
        self._ends = np.cumsum([episode.length for episode in self._episodes]).tolist()
        self.instructions = list(dict.fromkeys(episode.instruction for episode in self._episodes))
        self.statistics = statistics or DatasetStatistics(
            **{key: FeatureStatistics.from_samples(key, values) for key, values in training.items()}
        )
        # Row i is that of item i: its state, and the action that it is to begin with.
        self._states = self._as_items(chosen["state"], self.statistics.state)
        self._actions = self._as_items(chosen["actions"], self.statistics.actions)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} items")
        index %= len(self)
        position = bisect.bisect_right(self._ends, index)
        episode = self._episodes[position]
        step = index - (self._ends[position] - episode.length)

        images = [self._image(episode, camera, step) for camera in self.cameras]
        return {
            "images": images,
            "state": torch.from_numpy(self._states[index].copy()),
            "actions": torch.from_numpy(self._chunk(index, self._ends[position])),
            "action_is_pad": torch.arange(self.chunk_size) >= episode.length - step,
            "instruction": episode.instruction,
        }

    def action_chunks(self) -> Iterator[np.ndarray]:
        """The items' `actions`, `(H, A)`, float32, in order, without reading an image."""
        for episode, end in zip(self._episodes, self._ends, strict=True):
            for index in range(end - episode.length, end):
                yield self._chunk(index, end)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}, "_frames": {}}

    def _scan(
        self, tasks: list[RecordedTask], split: str, held_out_per_task: int
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], str]:
        """Checks every demonstration, lists the chosen ones; steps `(N, D)` to train on, those chosen, fingerprint."""
        digest = hashlib.sha256()
        training: dict[str, list[np.ndarray]] = {"state": [], "actions": []}
        kept: dict[str, list[np.ndarray]] = {"state": [], "actions": []}
        with tqdm(total=sum(len(task.demonstrations) for task in tasks), desc="demonstrations", delay=2) as progress:
            for task in tasks:
                chosen, reference = _split(task, split, held_out_per_task)
                file = self._open(task.file)
                for path in task.demonstrations:
                    with naming_damage(task.file):
                        demonstration = read_demonstration(file[path], task.convention, self.cameras)
                    assert demonstration is not None  # the strict report raises instead
                    usable = len(demonstration.actions) - task.convention.action_offset
                    for steps in [training] * (path in reference) + [kept] * (path in chosen):
                        steps["state"].append(demonstration.state[:usable])
                        steps["actions"].append(demonstration.actions[-usable:])
                    if path in chosen:
                        self._episodes.append(_Episode(task.file, path, task.instruction, task.convention, usable))
                        _update(digest, task, demonstration)
                    progress.update()
        whole = [{key: np.concatenate(steps) for key, steps in each.items()} for each in (training, kept)]
        return whole[0], whole[1], digest.hexdigest()

    def _as_items(self, values: np.ndarray, statistics: FeatureStatistics) -> np.ndarray:
        """Steps `(N, D)` as items have them."""
        return (normalize(values, statistics) if self.normalize else values).astype(np.float32)

    def _pictures(self, tasks: list[RecordedTask]) -> PictureSettings | None:
        found = set()
        for task in tasks:
            with naming_damage(task.file):
                found.add(read_pictures(self._open(task.file), task))
        pictures = common_pictures(found)
        resized = pictures is not None and self.image_size not in (None, pictures.image_size)
        return None if resized else pictures

    def _chunk(self, index: int, end: int) -> np.ndarray:
        """The chunk of an item whose episode ends before item `end`; its last action is repeated past that."""
        actions = np.empty((self.chunk_size, self._actions.shape[1]), np.float32)
        found = self._actions[index : min(index + self.chunk_size, end)]
        actions[: len(found)], actions[len(found) :] = found, found[-1]
        return actions

    def _image(self, episode: _Episode, camera: str, step: int) -> np.ndarray:
        file = self._open(episode.file)
        with naming_damage(episode.file):
            frame = read_frame(self._frames_of(file, episode, camera), step, episode.convention)
        if self.image_size is None or frame.shape[0] == self.image_size:
            return frame
        size = (self.image_size, self.image_size)
        return np.array(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR))

    def _frames_of(self, file: h5py.File, episode: _Episode, camera: str) -> h5py.Dataset:
        # To find and open a dataset takes several times as long as to read a frame of it.
        key = episode.file, f"{episode.path}/obs/{frames_key(camera, episode.convention)}"
        if key not in self._frames:
            if len(self._frames) >= _OPEN_FRAMES:
                del self._frames[next(iter(self._frames))]
            self._frames[key] = file[key[1]]
        return self._frames[key]

    def _open(self, file: str) -> h5py.File:
        # A handle inherited over a fork shares its file descriptor with the parent: each process opens its own.
        if self._handles_pid != os.getpid():
            self._close()
            self._handles_pid = os.getpid()
        if file not in self._handles:
            handle = open_libero_file(file, chunk_cache=False)  # thousands of datasets stay open, read in no order
            if _stamp(file) != self._stamps[file]:
                handle.close()
                raise LiberoFormatError(f"{file}: changed since the dataset was constructed, construct it anew")
            self._handles[file] = handle
        return self._handles[file]

    def _close(self) -> None:
        for handle in self._handles.values():
            handle.close()
        self._handles, self._frames = {}, {}

    def _refuse_short(self) -> None:
        short = [episode for episode in self._episodes if episode.length < self.chunk_size]
        if short:
            raise LiberoFormatError.at(
                short[0].file,
                short[0].path,
                f"{short[0].length} actions are fewer than chunk_size={self.chunk_size} (so for {len(short)} of "
                f"{len(self._episodes)} demonstrations, the shortest has {min(each.length for each in short)}): pass "
                "short_demonstrations='pad' or a smaller chunk_size",
            )


def _read_tasks(files: Sequence[str], image_origin: str, observation: str) -> list[RecordedTask]:
    tasks = []
    for path in files:
        with open_libero_file(path) as file, naming_damage(path):
            for group in find_data_groups(file):
                task = read_task(group, image_origin=image_origin, observation=observation)
                assert task is not None  # the strict report raises instead
                tasks.append(task)
    return tasks


def _select(tasks: list[RecordedTask], instructions: Sequence[str] | None) -> list[RecordedTask]:
    if instructions is None:
        return tasks
    present = sorted({task.instruction for task in tasks})
    if unknown := [instruction for instruction in instructions if instruction not in present]:
        raise ValueError(f"no task has the instruction {unknown[0]!r}, found {present}")
    if not instructions:
        raise ValueError("'instructions' is empty, nothing would be selected")
    return [task for task in tasks if task.instruction in instructions]


def _split(task: RecordedTask, split: str, held_out_per_task: int) -> tuple[set[str], set[str]]:
    """The demonstrations to read, and those whose statistics describe the training data."""
    paths = task.demonstrations
    if split == "all":
        return set(paths), set(paths)
    if len(paths) <= held_out_per_task:
        raise ValueError(
            f"{task.file}: {task.path}: {len(paths)} demonstrations leave none to train on with "
            f"held_out_per_task={held_out_per_task}"
        )
    train, held_out = set(paths[:-held_out_per_task]), set(paths[-held_out_per_task:])
    return (train if split == "train" else held_out), train


def _update(digest: Any, task: RecordedTask, demonstration: Demonstration) -> None:
    layout = {
        "instruction": task.instruction,
        "convention": asdict(task.convention),
        "length": len(demonstration.actions),
        "image_sizes": demonstration.image_sizes,
    }
    digest.update(json.dumps(layout, sort_keys=True).encode())
    for array in (demonstration.actions, demonstration.state):
        digest.update(np.ascontiguousarray(array, dtype="<f8").tobytes())


def _stamp(file: str) -> tuple[int, int]:
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def _require_dimensions(statistics: DatasetStatistics) -> None:
    for feature, expected in ((statistics.state, STATE_DIMENSION), (statistics.actions, ACTION_DIMENSION)):
        if feature.dimension != expected:
            raise ValueError(
                f"statistics of '{feature.name}' have {feature.dimension} dimensions, expected {expected}"
            )


def _require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"'{name}' must be one of {list(choices)}, found {value!r}")


def _require_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"'{name}' must be a positive integer, found {value!r}")
