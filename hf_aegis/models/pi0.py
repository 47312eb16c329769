"""transformers' π0: the vision-language model inside of it, and its processor with a dataset's statistics."""

import copy
import os
from typing import Any

import torch
from torch import nn
from transformers import PaliGemmaForConditionalGeneration, PI0ForConditionalGeneration, PI0Processor
from transformers import initialization as init

from hf_aegis.anchors import unwrap_model
from hf_aegis.functional.normalization import MINIMUM_HALF_RANGE, DatasetStatistics, FeatureStatistics


def pi0_vlm(model: nn.Module) -> PaliGemmaForConditionalGeneration:
    """
    The PaliGemma inside of a π0, sharing its modules: it answers questions with what π0 has become, and
    `pi0_vlm(model).save_pretrained(folder)` writes a stock PaliGemma checkpoint. The output head, which π0 has not, is
    the token embeddings, to which PaliGemma ties it.

    Adapters that PEFT injects into π0, before or afterwards, are in it as well: merge them before it is saved.

    Args:
        model ([`~transformers.PI0ForConditionalGeneration`]): The model, wrapped or not.

    Raises:
        TypeError: If it is another model.
        ValueError: If its language model was configured with a head of its own, whose weights π0 does not have.
    """
    base = unwrap_model(model)
    if not isinstance(base, PI0ForConditionalGeneration):
        raise TypeError(f"expected a PI0ForConditionalGeneration, found {type(base).__name__}")
    inner = base.model.vlm
    config = copy.copy(inner.config)
    if not config.get_text_config().tie_word_embeddings:
        raise ValueError(
            "the configuration has tie_word_embeddings=False: π0 has no output head, so its vision-language model can "
            "only answer with the one that is tied to its embeddings"
        )
    # What anchors of it are said to be of.
    config._name_or_path = base.name_or_path
    with torch.device("meta"), init.no_init_weights():
        vlm = PaliGemmaForConditionalGeneration(config)
    vlm.model = inner
    vlm.lm_head.weight = inner.get_input_embeddings().weight
    vlm.training = inner.training
    return vlm


def pi0_processor(
    name: str | os.PathLike,
    statistics: DatasetStatistics,
    chunk_size: int = 50,
    *,
    max_state_dim: int = 32,
    revision: str | None = None,
    token: str | bool | None = None,
) -> PI0Processor:
    """
    π0's processor with the mean and standard deviation of a dataset. Deviations below
    [`~functional.normalization.MINIMUM_HALF_RANGE`] are raised to it, lest the noise of a dimension that hardly moves
    be stretched to the size of a motion.

    Args:
        name (`str` or `os.PathLike`):
            A PaliGemma's processor, whose tokenizer π0 shares: `"google/paligemma-3b-pt-224"` for `lerobot/pi0_base`.
        statistics ([`~functional.normalization.DatasetStatistics`]): Of the training data.
        chunk_size (`int`, *optional*, defaults to `50`): Actions per chunk, as of the model's configuration.
        max_state_dim (`int`, *optional*, defaults to `32`):
            What state and actions are padded to with zeros, as of the model's configuration.
        revision, token (*optional*): Of a processor on the Hub.

    Raises:
        ValueError: If state or actions have more dimensions than `max_state_dim`.
    """
    moments: dict[str, Any] = {}
    for feature in (statistics.state, statistics.actions):
        if feature.dimension > max_state_dim:
            raise ValueError(
                f"'{feature.name}' has {feature.dimension} dimensions, more than the {max_state_dim} of π0's inputs"
            )
        moments |= {f"{feature.name}_mean": list(feature.mean), f"{feature.name}_std": _guarded(feature)}
    return PI0Processor.from_pretrained(
        name,
        revision=revision or "main",
        token=token,
        chunk_size=chunk_size,
        max_state_dim=max_state_dim,
        **moments,
    )


def _guarded(feature: FeatureStatistics) -> list[float]:
    return [max(value, MINIMUM_HALF_RANGE) for value in feature.std]
