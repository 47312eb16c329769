"""Configurations of vision-language models, for planning without their weights."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, Gemma2Config, PaliGemmaConfig, SiglipVisionConfig

from hf_aegis.assets import EMBEDDED_VLM


PALIGEMMA2_3B = ("google/paligemma2-3b-mix-224", "google/paligemma2-3b-pt-224")
"""Checkpoints whose shapes are known here: their configuration is behind a licence that has to be accepted first."""


def paligemma2_3b() -> PaliGemmaConfig:
    """The shapes of PaliGemma 2 with Gemma 2 2B and SigLIP-So400m/14 at 224 pixels (arXiv 2412.03555)."""
    text = Gemma2Config(
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        query_pre_attn_scalar=256,
        # 257,152, and 64 rows of padding that the conversion adds.
        vocab_size=257216,
    )
    vision = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        patch_size=14,
        image_size=224,
        projection_dim=2304,
        vision_use_head=False,
        num_image_tokens=256,  # type: ignore[call-arg]
    )
    return PaliGemmaConfig(
        text_config=text, vision_config=vision, projection_dim=2304, image_token_index=257152, hidden_size=2304
    )


def vlm_config(model: str | None, model_config: str | None = None) -> PaliGemmaConfig:
    """
    The configuration of a recipe's vision-language model.

    Args:
        model (`str`, *optional*): As in a recipe: a folder, or an id on the Hub; the embedded model by default.
        model_config (`str`, *optional*): A `config.json`, or its folder, to take in place of the model's own.

    Raises:
        OSError: If there is no such model, or it cannot be reached.
        ValueError: If the configuration is not that of a PaliGemma.
    """
    source = model_config or model or str(EMBEDDED_VLM)
    if model_config is not None and not Path(model_config).exists():
        raise OSError(f"model_config: {model_config} does not exist")
    if model_config is None and model in PALIGEMMA2_3B:
        return paligemma2_3b()
    try:
        config: Any = AutoConfig.from_pretrained(source)
    except OSError as error:
        raise OSError(
            f"the configuration of {source!r} cannot be had; give its config.json with --model_config. Shapes known "
            f"without a download: {', '.join(PALIGEMMA2_3B)}. {error}"
        ) from error
    if not isinstance(config, PaliGemmaConfig):
        raise ValueError(f"{source!r} is not a PaliGemma: its configuration has model_type {config.model_type!r}")
    return config
