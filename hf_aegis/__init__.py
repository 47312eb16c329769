"""Fine-tune a vision-language model into a robot policy without forgetting how to answer questions."""

from typing import Any

from hf_aegis.lazy_exports import resolve
from hf_aegis.tuners.registration import register_with_peft


__version__ = "0.1.0.dev0"

# Public names and where they live. Importing the package stays cheap: a room is opened when its first name is used.
_EXPORTS = {
    "ActivationAnchor": "hf_aegis.anchors",
    "AEGISConfig": "hf_aegis.training",
    "AEGISTrainer": "hf_aegis.training",
    "Certificate": "hf_aegis.gradients",
    "FASTTokenizer": "hf_aegis.data",
    "GSEConfig": "hf_aegis.tuners",
    "GSEModel": "hf_aegis.tuners",
    "GradientShield": "hf_aegis.gradients",
    "HeldSubspace": "hf_aegis.gradients",
    "LiberoDataset": "hf_aegis.data",
    "PaliGemmaFlowConfig": "hf_aegis.models",
    "PaliGemmaFlowForAction": "hf_aegis.models",
    "PaliGemmaFlowProcessor": "hf_aegis.models",
    "ReplayShield": "hf_aegis.gradients",
    "SubspaceOptions": "hf_aegis.anchors",
}

__all__ = ["__version__", *_EXPORTS]

register_with_peft()


def __getattr__(name: str) -> Any:
    return resolve(__name__, _EXPORTS, name)


def __dir__() -> list[str]:
    return sorted(__all__)
