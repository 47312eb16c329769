"""The LIBERO simulator, its tasks, and a scripted expert that solves two of its suites. Knows no models."""

import importlib
from typing import Any


_EXPORTS = {
    "LiberoEnvironment": "hf_aegis.simulation.libero_environment",
    "LiberoTask": "hf_aegis.simulation.libero_tasks",
    "ScriptedExpert": "hf_aegis.simulation.scripted_expert",
    "find_task": "hf_aegis.simulation.libero_tasks",
    "load_tasks": "hf_aegis.simulation.libero_tasks",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
