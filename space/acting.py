"""What a policy would do, and where that leads in the picture."""

import json

import numpy as np
import torch
from loading import Loaded
from observations import Observation
from settings import FOLDER


# Made by recipes/libero_geometry.py, which says what it is.
_GEOMETRY = json.loads((FOLDER / "geometry.json").read_text())


@torch.inference_mode()
def predict(loaded: Loaded, observation: Observation, instruction: str, seed: int) -> np.ndarray:
    """
    A policy's next actions `(H, 7)`, in robot units; the seed is that of the noise it starts from.

    Raises:
        ValueError: the policy was trained on other observations or actions.
    """
    model = loaded.model
    inputs = loaded.processor(images=observation.images, text=instruction, state=observation.state).to(model.device)
    generator = torch.Generator(model.device).manual_seed(seed)
    actions = model.sample_actions(**inputs, generator=generator)[0]
    if actions.shape[-1] != 7:
        raise ValueError(f"LIBERO's actions have 7 dimensions, found {actions.shape[-1]}")
    return np.asarray(loaded.processor.postprocess_actions(actions.float().cpu()))


def follow(actions: np.ndarray, observation: Observation) -> np.ndarray:
    """
    Where the gripper would go: positions `(H + 1, 3)` in m, by the controller's measured response to translations.
    """
    a, b = (np.asarray(_GEOMETRY["response"][name]) for name in ("a", "b"))
    positions, velocity = [observation.positions[0]], observation.velocity
    for action in np.clip(actions[:, :3], -1, 1):
        velocity = a * velocity + b * action
        positions.append(positions[-1] + velocity)
    return np.stack(positions)


def project(positions: np.ndarray, scene: str) -> np.ndarray | None:
    """
    Points `(n, 3)` in m in the agent view: `(n, 2)`, shares of its side from the left and from the top. `None` for a
    scene whose camera is not known.
    """
    if scene not in _GEOMETRY["cameras"]:
        return None
    homogeneous = np.concatenate([positions, np.ones((len(positions), 1))], axis=1)
    seen = homogeneous @ np.asarray(_GEOMETRY["cameras"][scene]).T
    return seen[:, :2] / seen[:, 2:]


def gripper_closes(actions: np.ndarray) -> np.ndarray:
    """Whether each of the actions `(H, 7)` tells the fingers to close, `(H,)`."""
    return actions[:, 6] > 0
