"""
Vision-language-action models that stay vision-language models: PaliGemma with a flow-matching action expert.

Importing this package registers them with transformers' auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from hf_aegis.models.action_expert import ActionExpert, CrossAttentionCache
from hf_aegis.models.collator_paligemma_flow import PaliGemmaFlowCollator
from hf_aegis.models.collator_pi0 import PI0Collator
from hf_aegis.models.configuration_paligemma_flow import PaliGemmaFlowConfig
from hf_aegis.models.modeling_paligemma_flow import PaliGemmaFlowForAction, PaliGemmaFlowOutput
from hf_aegis.models.pi0 import pi0_processor, pi0_vlm
from hf_aegis.models.processing_paligemma_flow import PaliGemmaFlowProcessor


# exist_ok: importing again after a reload must not fail.
AutoConfig.register(PaliGemmaFlowConfig.model_type, PaliGemmaFlowConfig, exist_ok=True)
AutoModel.register(PaliGemmaFlowConfig, PaliGemmaFlowForAction, exist_ok=True)
AutoModelForImageTextToText.register(PaliGemmaFlowConfig, PaliGemmaFlowForAction, exist_ok=True)
AutoProcessor.register(PaliGemmaFlowConfig, PaliGemmaFlowProcessor, exist_ok=True)

__all__ = [
    "ActionExpert",
    "CrossAttentionCache",
    "PI0Collator",
    "PaliGemmaFlowCollator",
    "PaliGemmaFlowConfig",
    "PaliGemmaFlowForAction",
    "PaliGemmaFlowOutput",
    "PaliGemmaFlowProcessor",
    "pi0_processor",
    "pi0_vlm",
]
