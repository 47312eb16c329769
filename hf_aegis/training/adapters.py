"""Adapters on the language model of a `PaliGemmaFlowForAction`, beside a projector and expert that train in full."""

import warnings
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

from hf_aegis.models import PaliGemmaFlowForAction
from hf_aegis.tuners.gse import GSEConfig


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
    return _add_adapters(model, "lora", LoraConfig, "peft.LoraConfig such as r, lora_alpha", options)


def add_gse(model: PaliGemmaFlowForAction, options: dict[str, Any]) -> PeftModel:
    """
    Puts generalized and specialized experts (VLA-GSE, arXiv 2605.06175) on the same layers as [`add_lora`] its
    adapters; projector and expert train in full, all else is frozen.

    Args:
        model ([`PaliGemmaFlowForAction`]): Is changed in place; its weights are not.
        options (`dict`): Fields of [`GSEConfig`], such as `r` and `num_experts`; those given here win.

    Raises:
        ValueError: If an option is not a field of [`GSEConfig`], or does not fit the model's layers.
    """
    return _add_adapters(model, "gse", GSEConfig, "GSEConfig such as r, num_experts", options)


def _add_adapters(
    model: PaliGemmaFlowForAction, name: str, config_class: type[PeftConfig], such: str, options: dict[str, Any]
) -> PeftModel:
    if unknown := sorted(set(options) - set(config_class.__dataclass_fields__)):
        raise ValueError(f"{name}: unknown key {unknown[0]!r}, expected fields of {such}")
    defaults: dict[str, Any] = {
        "target_modules": LANGUAGE_MODEL_PROJECTIONS,
        "modules_to_save": list(TRAINED_IN_FULL),
    }
    with warnings.catch_warnings():
        # peft asks transformers by a name that is deprecated there.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, config_class(**{**defaults, **options}))
