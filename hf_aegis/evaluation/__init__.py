"""
What a model still knows, by questions scored as published, and how it acts (`rollouts`). Names are imported when first
used.
"""

from typing import Any

from hf_aegis.lazy_exports import resolve


_EXPORTS = {
    "VQAHoldout": "hf_aegis.evaluation.vqa",
    "VQARecord": "hf_aegis.evaluation.vqa_scores",
    "VQAResult": "hf_aegis.evaluation.vqa_scores",
    "VQAScore": "hf_aegis.evaluation.vqa_scores",
    "load_metric": "hf_aegis.evaluation.metrics",
    "survey": "hf_aegis.evaluation.vqa_survey",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    return resolve(__name__, _EXPORTS, name)


def __dir__() -> list[str]:
    return sorted(__all__)
