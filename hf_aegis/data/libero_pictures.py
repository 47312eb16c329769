"""How the pictures of demonstrations were rendered, as far as their file says: a policy should act upon such ones."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import h5py

from hf_aegis.data.libero_files import (
    find_data_groups,
    naming_damage,
    open_libero_file,
    read_child,
    refuse,
    resolve_files,
)
from hf_aegis.data.libero_format import (
    CONVENTION_ATTRIBUTE,
    RECORDING_ATTRIBUTE,
    LiberoFormatError,
    read_recording,
)
from hf_aegis.data.libero_hdf5 import RecordedTask, read_task


RENDERINGS = ("fast", "standard")


@dataclass(frozen=True)
class PictureSettings:
    """
    How a simulator's pictures are rendered.

    Args:
        image_size (`int`): side of the square pictures, in pixels.
        supersampling (`int`, *optional*, defaults to `1`): they are rendered so many times larger and averaged down.
        rendering (`"fast"` or `"standard"`, *optional*, defaults to `"standard"`): without shadows, reflections and
            multisampling, or LIBERO's own picture.

    Raises:
        ValueError: a value is not allowed.
    """

    image_size: int
    supersampling: int = 1
    rendering: Literal["fast", "standard"] = "standard"

    def __post_init__(self) -> None:
        for name in ("image_size", "supersampling"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ValueError(f"'{name}' must be a positive integer, found {value!r}")
        if self.rendering not in RENDERINGS:
            raise ValueError(f"'rendering' must be one of {list(RENDERINGS)}, found {self.rendering!r}")

    def __str__(self) -> str:
        return f"image_size {self.image_size}, supersampling {self.supersampling}, rendering {self.rendering}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """
        Inverse of `to_dict`.

        Raises:
            ValueError: a key is missing or unknown, or a value is not allowed.
        """
        names = cls.__dataclass_fields__.keys()
        if values.keys() != names:
            raise ValueError(f"expected the keys {list(names)}, found {sorted(values)}")
        return cls(**values)


def read_pictures(file: h5py.File, task: RecordedTask) -> PictureSettings | None:
    """
    How the pictures of a task were rendered.

    Files recorded by hf-aegis say it. Those without any word of hf-aegis are taken for released ones, which hold
    LIBERO's own pictures.

    Args:
        file (`h5py.File`): the task's file.
        task (`RecordedTask`): of it, checked.

    Returns:
        `PictureSettings`, or `None` where the file does not say.

    Raises:
        LiberoFormatError: what it says cannot be read.
    """
    attributes = file[task.path].attrs
    if RECORDING_ATTRIBUTE in attributes:
        try:
            settings = read_recording(attributes).get("settings")
            if not isinstance(settings, dict):
                raise ValueError(f"expected the key 'settings' with an object, found {settings!r}")
            names = PictureSettings.__dataclass_fields__.keys()
            if names - settings.keys():
                return None
            return PictureSettings.from_dict({name: settings[name] for name in names})
        except ValueError as error:
            raise LiberoFormatError.at(task.file, f"{task.path}@{RECORDING_ATTRIBUTE}", str(error)) from error
    if CONVENTION_ATTRIBUTE in attributes:
        return None
    observations = read_child(file[task.demonstrations[0]], "obs", refuse)
    if not isinstance(observations, h5py.Group):
        raise LiberoFormatError.at(task.file, f"{task.demonstrations[0]}/obs", "expected a group")
    found = (read_child(observations, name, refuse) for name in observations)
    # Pictures are the observations (T, s, s, 3).
    sides = {int(frames.shape[1]) for frames in found if isinstance(frames, h5py.Dataset) and frames.ndim == 4}
    return PictureSettings(sides.pop()) if len(sides) == 1 and 0 not in sides else None


def pictures_of(paths: str | os.PathLike | Sequence[str | os.PathLike]) -> PictureSettings | None:
    """
    How the pictures of demonstration files were rendered; `None` where they do not say or differ.

    Args:
        paths (`str`, `os.PathLike` or a sequence of them): files, or folders that stand for every `*.hdf5` below.

    Raises:
        FileNotFoundError: a path does not exist.
        LiberoFormatError: a file is not what it should be.
    """
    found = set()
    for path in resolve_files(paths):
        with open_libero_file(path) as file, naming_damage(path):
            for group in find_data_groups(file):
                task = read_task(group)
                assert task is not None  # the strict report raises instead
                found.add(read_pictures(file, task))
    return common_pictures(found)


def common_pictures(found: set[PictureSettings | None]) -> PictureSettings | None:
    """The settings of all tasks of a data set, or `None` where they are not the same or not known."""
    return next(iter(found)) if len(found) == 1 else None
