"""Training: a `transformers` Trainer whose task gradients pass through the shield, and what it reports."""

from hf_aegis.training.aegis_config import AEGISConfig
from hf_aegis.training.aegis_trainer import AEGISTrainer
from hf_aegis.training.checkpoints import last_complete_checkpoint
from hf_aegis.training.expert_ema import ExpertEMA


__all__ = ["AEGISConfig", "AEGISTrainer", "ExpertEMA", "last_complete_checkpoint"]
