"""
Rollouts: a policy acts in a simulator, episode by episode, and is scored by how often it succeeds.

`policy` says what a policy is; `model_policy` is the trained one, `simulator_policies` are those that check the rest.
"""

from typing import Any

from hf_aegis.lazy_exports import resolve


_EXPORTS = {
    "BatchedPolicy": "hf_aegis.evaluation.rollouts.policy",
    "ModelPolicy": "hf_aegis.evaluation.rollouts.model_policy",
    "Observation": "hf_aegis.evaluation.rollouts.policy",
    "Policy": "hf_aegis.evaluation.rollouts.policy",
    "PolicyError": "hf_aegis.evaluation.rollouts.policy",
    "PolicyRequest": "hf_aegis.evaluation.rollouts.policy",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    return resolve(__name__, _EXPORTS, name)


def __dir__() -> list[str]:
    return sorted(__all__)
