"""
Training: a `transformers` Trainer whose task gradients pass through the shield, and what it reports. Names are
imported when first used.
"""

from typing import Any

from hf_aegis.lazy_exports import resolve


_EXPORTS = {
    "AEGISConfig": "hf_aegis.training.aegis_config",
    "AEGISTrainer": "hf_aegis.training.aegis_trainer",
    "DataLoadingError": "hf_aegis.training.loading_errors",
    "ModelNotSavedError": "hf_aegis.training.checkpoint_writing",
    "NonFiniteTrainingError": "hf_aegis.training.non_finite_guard",
    "TrainingEndedError": "hf_aegis.training.training_ended",
    "TrainingOutOfMemoryError": "hf_aegis.training.out_of_memory",
    "ExpertEMA": "hf_aegis.training.expert_ema",
    "last_complete_checkpoint": "hf_aegis.training.checkpoints",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    return resolve(__name__, _EXPORTS, name)


def __dir__() -> list[str]:
    return sorted(__all__)
