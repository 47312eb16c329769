"""What a LIBERO demonstration file holds, and how its images and observations are to be read.

A task is one HDF5 group called `data`, either at the root of its own file (as LIBERO releases them) or at
`<suite>/<task>/data` in a combined file. Two conventions exist:

- *released*: frames as OpenGL renders them (origin at the bottom left, i.e. upside down), and the observation of step
  `t` seen *after* action `t`;
- *recorded by hf-aegis*: upright frames, the observation seen *before* the action, said so by the attribute
  `hf_aegis_convention` of the `data` group.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import h5py
import numpy as np

from hf_aegis.format_version import check_format_version, written_version
from hf_aegis.json_files import parse_json_object


CAMERAS = ("agentview_rgb", "eye_in_hand_rgb")
"""Names of the camera images under `obs`."""

STATE_FEATURES = {"joint_states": 7, "gripper_states": 2}
"""Proprioceptive datasets under `obs` and their widths, in the order the state concatenates them."""

STATE_DIMENSION = sum(STATE_FEATURES.values())
ACTION_DIMENSION = 7

CONVENTION_ATTRIBUTE = "hf_aegis_convention"
RECORDING_ATTRIBUTE = "hf_aegis_recording"
"""What hf-aegis' recorder was asked for, the pictures' rendering included, how often it tried, and with what."""
JPEG_SUFFIX = "_jpeg"
"""Appended to a camera's name where its frames are stored as JPEG streams."""

LARGEST_SIDE = 4096
"""Of frames, in pixels: what a file says is larger is refused before it is read."""

OBSERVATIONS = ("before_action", "after_action")
IMAGE_ORIGINS = ("top_left", "bottom_left")
FRAMES = ("raw", "jpeg")

# robosuite's macro IMAGE_CONVENTION, which LIBERO writes into every released file.
_KIND = "demonstrations"
_ORIGIN_OF_MACRO = {"opengl": "bottom_left", "opencv": "top_left"}


class LiberoFormatError(ValueError):
    """A demonstration file is not what it should be; the message names the file, the place in it, and the remedy."""

    @classmethod
    def at(cls, file: str | os.PathLike, location: str, problem: str) -> "LiberoFormatError":
        """The error for one place (an HDF5 path, possibly with `@attribute`) of one file."""
        return cls(f"{os.fspath(file)}: {location}: {problem}")


@dataclass(frozen=True)
class LiberoConvention:
    """
    How the frames and observations of a task are stored.

    Args:
        observation (`str`): `"before_action"` or `"after_action"`: when observation `t` was taken, relative to
            action `t`.
        image_origin (`str`): `"top_left"` (upright) or `"bottom_left"` (vertically flipped).
        frames (`str`, *optional*, defaults to `"raw"`): `"raw"` arrays `(T, s, s, 3)` or `"jpeg"` streams.
        image_size (`int`, *optional*): side `s` of the square frames, in pixels; `None` where the file leaves it to
            the arrays' shape. Required for `"jpeg"`.

    Raises:
        ValueError: a value is not one of those listed.
    """

    observation: str
    image_origin: str
    frames: str = "raw"
    image_size: int | None = None

    def __post_init__(self) -> None:
        for key, choices in (("observation", OBSERVATIONS), ("image_origin", IMAGE_ORIGINS), ("frames", FRAMES)):
            if getattr(self, key) not in choices:
                raise ValueError(f"'{key}' must be one of {list(choices)}, found {getattr(self, key)!r}")
        if self.image_size is None:
            if self.frames == "jpeg":
                raise ValueError("'image_size' is required where frames are stored as JPEG")
        elif type(self.image_size) is not int or not 1 <= self.image_size <= LARGEST_SIDE:
            raise ValueError(f"'image_size' must be an integer from 1 to {LARGEST_SIDE}, found {self.image_size!r}")

    @property
    def action_offset(self) -> int:
        """How many steps later the action taken *upon* an observation is stored: 0 or 1."""
        return 1 if self.observation == "after_action" else 0

    def to_json(self) -> str:
        """The value of the attribute `hf_aegis_convention`."""
        return json.dumps({**written_version(_KIND), **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> "LiberoConvention":
        """
        Inverse of `to_json`.

        Raises:
            ValueError: not JSON, a missing key, a value that is not allowed, or a newer format.
        """
        values = parse_json_object(text, "its text")
        check_format_version(values, _KIND, "its text")
        keys = ("observation", "image_origin", "frames", "image_size")
        if missing := [key for key in keys if key not in values]:
            raise ValueError(f"missing keys {missing}, found {sorted(values)}")
        return cls(**{key: values[key] for key in keys})


def text_attribute(attributes: Mapping[str, Any], key: str) -> str:
    """
    A string attribute, whatever way HDF5 stores it.

    Raises:
        ValueError: the attribute is missing or no string.
    """
    value = _scalar(attributes, key)
    try:
        if isinstance(value, bytes):
            value = value.decode("utf-8")
        if not isinstance(value, str):
            raise ValueError(f"expected a string, found {type(value).__name__}")
        # h5py gives bytes that are no UTF-8 as halves of surrogate pairs.
        value.encode("utf-8")
    except UnicodeError as error:
        raise ValueError(f"expected a string in UTF-8: {error}") from error
    return value


def integer_attribute(attributes: Mapping[str, Any], key: str) -> int:
    """
    An integer attribute.

    Raises:
        ValueError: the attribute is missing or no integer.
    """
    value = _scalar(attributes, key)
    if not isinstance(value, int | np.integer):
        raise ValueError(f"expected an integer, found {value!r}")
    return int(value)


def read_recording(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """
    What the recorder noted of a `data` group.

    Raises:
        ValueError: the attribute is missing or no JSON object, or has a newer format.
    """
    values = parse_json_object(text_attribute(attributes, RECORDING_ATTRIBUTE), "its text")
    check_format_version(values, "recording", "its text")
    return values


def _scalar(attributes: Mapping[str, Any], key: str) -> Any:
    """An attribute that is no array, which is told before its value is read."""
    if key not in attributes:
        raise ValueError(f"missing attribute, found {sorted(map(str, attributes))}")
    if not isinstance(attributes, h5py.AttributeManager):
        return attributes[key]
    try:
        stored = attributes.get_id(key)
        if stored.shape != ():
            raise ValueError(f"expected a single value, found shape {stored.shape}")
        _ = stored.dtype
        return attributes[key]
    except TypeError as error:
        raise ValueError(f"a type that cannot be read: {error}") from error


def read_convention(
    attributes: Mapping[str, Any], image_origin: str = "auto", observation: str = "auto"
) -> LiberoConvention:
    """
    The convention of a `data` group.

    `"auto"` follows `hf_aegis_convention` where present; otherwise the file is taken for a released one: observations
    after the action, and the image origin that `macros_image_convention` names (`opengl` or `opencv`). A value given
    explicitly overrides what the file says.

    Args:
        attributes (`Mapping`): attributes of the `data` group.
        image_origin (`str`, *optional*, defaults to `"auto"`): `"auto"`, `"top_left"` or `"bottom_left"`.
        observation (`str`, *optional*, defaults to `"auto"`): `"auto"`, `"before_action"` or `"after_action"`.

    Raises:
        ValueError: an attribute is missing or unreadable; the message starts with its name.
    """
    if CONVENTION_ATTRIBUTE in attributes:
        try:
            stated = LiberoConvention.from_json(text_attribute(attributes, CONVENTION_ATTRIBUTE))
        except ValueError as error:
            raise ValueError(f"@{CONVENTION_ATTRIBUTE}: {error}") from error
    else:
        stated = LiberoConvention(
            "after_action", _released_origin(attributes) if image_origin == "auto" else "top_left"
        )
    return LiberoConvention(
        observation=stated.observation if observation == "auto" else observation,
        image_origin=stated.image_origin if image_origin == "auto" else image_origin,
        frames=stated.frames,
        image_size=stated.image_size,
    )


def _released_origin(attributes: Mapping[str, Any]) -> str:
    remedy = "pass image_origin='bottom_left' (upside-down frames) or 'top_left' to say it yourself"
    try:
        macro = text_attribute(attributes, "macros_image_convention")
    except ValueError as error:
        raise ValueError(f"@macros_image_convention: {error}; {remedy}") from error
    if macro not in _ORIGIN_OF_MACRO:
        raise ValueError(
            f"@macros_image_convention: expected one of {list(_ORIGIN_OF_MACRO)}, found {macro!r}; {remedy}"
        )
    return _ORIGIN_OF_MACRO[macro]
