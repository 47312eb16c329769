"""
How clients name, order and turn what they send, and how it becomes an [`~evaluation.rollouts.Observation`].

- `libero-openpi` is what openpi's `examples/libero/main.py` sends: `observation/image` (the agent's view) and
  `observation/wrist_image`, and in `observation/state` (8,) position (3), axis-angle (3) and fingers (2), which are
  LIBERO's `ee_pos`, `ee_ori` and `gripper_states`. It turns the simulator's pictures, which OpenGL stores bottom row
  first, by 180 degrees. That puts the top row first, and left where right is: they are mirror images, and are mirrored
  back. A policy that was trained on joints needs `observation/joint_position` (7,) beside them, openpi's name in its
  DROID example.
- `native` has LIBERO's names, each on its own: `observation/agentview_rgb`, `observation/eye_in_hand_rgb`, upright;
  `observation/joint_states`, `observation/gripper_states`, ...

Both send the instruction as `prompt`. What a policy does not look at need not be sent; other keys are ignored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_aegis.evaluation.rollouts.policy import FEATURE_WIDTHS, Observation
from hf_aegis.functional.prompt_text import prompt_fault
from hf_aegis.serving.messages import MessageError


PROMPT_KEY = "prompt"
MAX_IMAGE_SIDE = 4096
"""Pixels. A picture that is resized to the model's few hundred needs no more."""


@dataclass(frozen=True)
class _Vector:
    """A vector that a client sends, and which columns of it are which proprioceptive features."""

    key: str
    width: int
    columns: Mapping[str, slice]


@dataclass(frozen=True)
class _Convention:
    images: Mapping[str, str]
    mirrored: bool
    vectors: Sequence[_Vector]


_CONVENTIONS = {
    "libero-openpi": _Convention(
        images={"agentview_rgb": "observation/image", "eye_in_hand_rgb": "observation/wrist_image"},
        mirrored=True,
        vectors=(
            _Vector(
                "observation/state",
                8,
                {
                    "ee_pos": slice(0, 3),
                    "ee_ori": slice(3, 6),
                    "ee_states": slice(0, 6),
                    "gripper_states": slice(6, 8),
                },
            ),
            _Vector("observation/joint_position", 7, {"joint_states": slice(0, 7)}),
        ),
    ),
    "native": _Convention(
        images={name: f"observation/{name}" for name in ("agentview_rgb", "eye_in_hand_rgb")},
        mirrored=False,
        vectors=tuple(
            _Vector(f"observation/{name}", width, {name: slice(0, width)}) for name, width in FEATURE_WIDTHS.items()
        ),
    ),
}

CLIENTS = tuple(_CONVENTIONS)


class ObservationReader:
    """
    Turns a client's messages into what a policy is asked.

    Args:
        client (`str`): One of [`CLIENTS`].
        cameras (`Sequence[str]`): The images that the policy looks at.
        state_features (`Sequence[str]`): The proprioception that it takes.

    Attributes:
        expected (`dict[str, str]`): The keys that a message has to have, and what belongs there, in words.

    Raises:
        ValueError: If there is no such client, or it does not send what the policy needs.
    """

    def __init__(self, client: str, cameras: Sequence[str], state_features: Sequence[str]):
        if client not in _CONVENTIONS:
            raise ValueError(f"client must be one of {', '.join(CLIENTS)}; found {client!r}")
        convention = _CONVENTIONS[client]
        if unknown := [name for name in cameras if name not in convention.images]:
            raise ValueError(
                f"{client!r} clients send images of {list(convention.images)}; the policy needs {unknown}"
            )
        sent = {name for vector in convention.vectors for name in vector.columns}
        if unknown := [name for name in state_features if name not in sent]:
            raise ValueError(f"{client!r} clients send the state as {sorted(sent)}; the policy needs {unknown}")
        self.client = client
        self._images = {name: convention.images[name] for name in cameras}
        self._mirrored = convention.mirrored
        self._vectors = [vector for vector in convention.vectors if set(vector.columns) & set(state_features)]
        turned = "mirrored left to right" if convention.mirrored else "upright"
        self.expected = {
            PROMPT_KEY: "the instruction",
            **{key: f"{name}, uint8 (h, w, 3), RGB, top row first, {turned}" for name, key in self._images.items()},
            **{vector.key: _described(vector) for vector in self._vectors},
        }

    def read(self, message: Any, step: int = 0) -> tuple[str, Observation]:
        """
        Checks a message.

        Args:
            message (`Any`): As [`~serving.messages.unpack`] gives it.
            step (`int`, *optional*, defaults to `0`): As of [`~evaluation.rollouts.Observation`].

        Returns:
            `tuple[str, Observation]`: The instruction, and what is seen.

        Raises:
            MessageError: If the message is not a dictionary with the [`expected`] keys and what belongs there; key,
                what was found and what was expected are named.
        """
        if not isinstance(message, dict):
            raise MessageError(f"an observation is a dictionary; found a {type(message).__name__}")
        if missing := [key for key in self.expected if key not in message]:
            # In the message's own words only as far as they are text: a key may be any bytes.
            found = sorted(key[:40] for key in message if isinstance(key, str))[:20]
            raise MessageError(f"missing keys {missing}; found {found}, expected {list(self.expected)}")
        images = {name: _image(message[key], key) for name, key in self._images.items()}
        if self._mirrored:
            images = {name: np.ascontiguousarray(image[:, ::-1]) for name, image in images.items()}
        proprioception: dict[str, np.ndarray] = {}
        for vector in self._vectors:
            values = _vector(message[vector.key], vector.key, vector.width)
            proprioception |= {name: values[columns] for name, columns in vector.columns.items()}
        return _prompt(message[PROMPT_KEY]), Observation(images, proprioception, step)


def _described(vector: _Vector) -> str:
    parts = ", ".join(
        f"{name} [{columns.start}:{columns.stop}]" for name, columns in vector.columns.items() if name != "ee_states"
    )
    return f"({vector.width},): {parts}"


def _prompt(value: Any) -> str:
    if not isinstance(value, str):
        raise MessageError(f"{PROMPT_KEY!r} must be a string, the instruction; found a {type(value).__name__}")
    if fault := prompt_fault(value):
        raise MessageError(f"{PROMPT_KEY!r}, the instruction, {fault}")
    return value


def _image(value: Any, key: str) -> np.ndarray:
    expected = "expected a uint8 array of shape (h, w, 3)"
    if not isinstance(value, np.ndarray):
        raise MessageError(f"{key!r} is a {type(value).__name__}: {expected}")
    if value.dtype != np.uint8 or value.ndim != 3 or value.shape[-1] != 3 or 0 in value.shape:
        raise MessageError(f"{key!r} is {value.dtype} of shape {value.shape}: {expected}")
    if max(value.shape) > MAX_IMAGE_SIDE:
        raise MessageError(f"{key!r} has shape {value.shape}: expected at most {MAX_IMAGE_SIDE} pixels a side")
    return value


def _vector(value: Any, key: str, width: int) -> np.ndarray:
    expected = f"expected {width} numbers, shape ({width},)"
    if isinstance(value, list) and all(type(item) in (int, float) for item in value):
        value = np.array(value, dtype=np.float64)
    if not isinstance(value, np.ndarray):
        raise MessageError(f"{key!r} is a {type(value).__name__}: {expected}")
    if value.dtype.kind not in "fiu" or value.shape != (width,):
        raise MessageError(f"{key!r} is {value.dtype} of shape {value.shape}: {expected}")
    value = value.astype(np.float64)
    # Policies compute in 32 bits or fewer, where a larger number would be infinite.
    finite = np.abs(value) <= np.finfo(np.float32).max
    if not finite.all():
        column = int(np.argmin(finite))
        raise MessageError(f"{key!r} is {value[column]} in column {column}: expected finite numbers")
    return value
