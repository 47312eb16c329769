"""Low-rank adapters on the language model of a `PaliGemmaFlowForAction`, beside a projector and expert that train."""

import warnings
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model

from hf_aegis.models import PaliGemmaFlowForAction


LANGUAGE_MODEL_PROJECTIONS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
TRAINED_IN_FULL = ("multi_modal_projector", "action_expert")


def add_lora(model: PaliGemmaFlowForAction, options: dict[str, Any]) -> PeftModel:
    """
    Puts LoRA on the seven projections of each language model layer; projector and expert train in full, all else is
    frozen (the LoRA condition of arXiv 2604.16067).

    Args:
        model ([`PaliGemmaFlowForAction`]): Is changed in place.
        options (`dict`): Fields of `peft.LoraConfig`, such as `r` and `lora_alpha`; those given here win.

    Raises:
        ValueError: If an option is not a field of `peft.LoraConfig`.
    """
    if unknown := sorted(set(options) - set(LoraConfig.__dataclass_fields__)):
        raise ValueError(f"lora: unknown key {unknown[0]!r}, expected fields of peft.LoraConfig such as r, lora_alpha")
    defaults: dict[str, Any] = {
        "target_modules": LANGUAGE_MODEL_PROJECTIONS,
        "modules_to_save": list(TRAINED_IN_FULL),
    }
    with warnings.catch_warnings():
        # peft asks transformers by a name that is deprecated there.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, LoraConfig(**{**defaults, **options}))
