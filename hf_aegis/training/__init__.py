"""
Training: a `transformers` Trainer whose task gradients pass through the shield, and what it reports. Names are
imported when first used.
"""

import importlib
from typing import Any


_EXPORTS = {
    "AEGISConfig": "hf_aegis.training.aegis_config",
    "AEGISTrainer": "hf_aegis.training.aegis_trainer",
    "ExpertEMA": "hf_aegis.training.expert_ema",
    "last_complete_checkpoint": "hf_aegis.training.checkpoints",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
