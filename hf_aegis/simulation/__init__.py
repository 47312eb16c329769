"""The LIBERO simulator, its tasks, and a scripted expert that solves two of its suites. Knows no models."""

from typing import Any

from hf_aegis.lazy_exports import resolve


_EXPORTS = {
    "LiberoEnvironment": "hf_aegis.simulation.libero_environment",
    "LiberoTask": "hf_aegis.simulation.libero_tasks",
    "ScriptedExpert": "hf_aegis.simulation.scripted_expert",
    "find_task": "hf_aegis.simulation.libero_tasks",
    "load_tasks": "hf_aegis.simulation.libero_tasks",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    return resolve(__name__, _EXPORTS, name)


def __dir__() -> list[str]:
    return sorted(__all__)
