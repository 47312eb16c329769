"""What the page shows, and how much it accepts. Models are chosen by environment variables."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from hf_aegis.assets import DEMO_CHECKPOINTS, DEMONSTRATIONS, EMBEDDED_VLM


FOLDER = Path(__file__).parent

MAX_IMAGE_BYTES = 4 * 1024 * 1024
MAX_IMAGE_PIXELS = 16_000_000
MAX_TEXT_LENGTH = 200
MAX_WAITING = 24
"""Visitors in the queue; who comes then is asked to come back."""


@dataclass(frozen=True)
class ShownModel:
    """
    A model that the page compares.

    Args:
        key (`str`): Its short name, and the CSS class of its colour.
        label (`str`): What visitors read.
        summary (`str`): What was done to it, in a few words.
        source (`str`): Folder, or id on the Hub.
        embedded (`bool`): Whether it is the one that ships with the package.
        acts (`bool`): Whether it has an action expert.
    """

    key: str
    label: str
    summary: str
    source: str
    embedded: bool
    acts: bool


# Key -> (label, summary, environment variable, default).
_MODELS = {
    "base": ("Before", "the pre-trained model", "AEGIS_SPACE_BASE", EMBEDDED_VLM),
    "naive": ("Naive", "fine-tuned to act, nothing kept", "AEGIS_SPACE_NAIVE", DEMO_CHECKPOINTS["naive"]),
    "aegis": ("AEGIS", "gradients projected", "AEGIS_SPACE_AEGIS", DEMO_CHECKPOINTS["aegis"]),
    "held": (
        "Held pairs",
        "sensitive directions restored, a penalty",
        "AEGIS_SPACE_HELD",
        DEMO_CHECKPOINTS["held_pairs"],
    ),
}


def _chosen() -> dict[str, str]:
    """What the variables say: those of the environment, before those that the page was deployed with."""
    deployed = FOLDER / "models.json"
    return {**(json.loads(deployed.read_text()) if deployed.is_file() else {}), **os.environ}


def shown_models() -> list[ShownModel]:
    """The models to compare, in their order. One whose variable is set to nothing is left out."""
    models, chosen = [], _chosen()
    for key, (label, summary, variable, default) in _MODELS.items():
        source = chosen.get(variable, str(default)).strip()
        if source:
            models.append(ShownModel(key, label, summary, source, source == str(default), acts=key != "base"))
    return models


def demonstrations() -> Path:
    """The file of LIBERO demonstrations that observations are taken from."""
    return Path(os.environ.get("AEGIS_SPACE_DEMONSTRATIONS") or DEMONSTRATIONS)
