"""Between a plain PaliGemma and one with an action expert: checkpoints, configurations, attention implementations."""

from typing import Any

import torch
from transformers import AutoConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file, extract_commit_hash

from hf_aegis.machine_paths import portable_name
from hf_aegis.models.configuration_paligemma_flow import PaliGemmaFlowConfig


_PARTS = ("text_config", "vision_config")
_FLOW_FIELDS = frozenset(PaliGemmaFlowConfig.__annotations__)


def load_vlm(
    name: str, attn_implementation: str | dict, dtype: torch.dtype | str | None, vlm_kwargs: dict[str, Any]
) -> PaliGemmaForConditionalGeneration:
    """
    Loads a stock PaliGemma checkpoint.

    Args:
        name (`str`): folder, or name on the Hub.
        attn_implementation (`str` or `dict`): for the whole model, or by part; `"eager"` for parts not named.
        dtype (`torch.dtype` or `str`, *optional*): as of `from_pretrained`.
        vlm_kwargs (`dict`): further arguments of `from_pretrained`.

    Raises:
        ValueError: the checkpoint already has an action expert or is not a PaliGemma, or `"sdpa"` is asked for where
            attention scores are soft-capped.
    """
    places = ("revision", "token", "cache_dir", "subfolder", "local_files_only")
    located = {key: vlm_kwargs[key] for key in places if key in vlm_kwargs}
    # All of one commit, which is worth noting: the branch may be another tomorrow.
    commit = located_commit(name, **located)
    vlm_kwargs = {"use_safetensors": True, **vlm_kwargs}
    if commit is not None:
        located["revision"] = commit
        vlm_kwargs = {**vlm_kwargs, "revision": commit}
    config: Any = AutoConfig.from_pretrained(name, **located)
    if isinstance(config, PaliGemmaFlowConfig):
        raise ValueError(f"'{name}' already has an action expert: load it with PaliGemmaFlowForAction.from_pretrained")
    if not isinstance(config, PaliGemmaConfig):
        raise ValueError(f"'{name}' is not a PaliGemma: its configuration has model_type '{config.model_type}'")
    if isinstance(attn_implementation, str):
        attn_implementation = dict.fromkeys(("", *_PARTS), attn_implementation)
    attn_implementation = dict.fromkeys(("", *_PARTS), "eager") | attn_implementation
    _refuse_sdpa_with_softcapping(config, attn_implementation["text_config"])
    arguments = vlm_kwargs if dtype is None else {**vlm_kwargs, "dtype": dtype}
    vlm = PaliGemmaForConditionalGeneration.from_pretrained(name, attn_implementation=attn_implementation, **arguments)
    # Where transformers kept it before version 5; not saved.
    vlm.config._commit_hash = commit
    return vlm


def located_commit(name: str, **located: Any) -> str | None:
    """
    The commit that a model on the Hub, or in its cache, is loaded at, which transformers does not keep; `None` of one
    in a folder.

    Args:
        name (`str`): folder, or name on the Hub.
        located: `revision`, `token`, `cache_dir`, `subfolder` and `local_files_only`, as of `from_pretrained`.

    Raises:
        OSError: there is no such model.
    """
    return extract_commit_hash(cached_file(name, CONFIG_NAME, **located), None)


def flow_config(vlm: PaliGemmaForConditionalGeneration, overrides: dict[str, Any]) -> PaliGemmaFlowConfig:
    """
    The configuration of `vlm` with an action expert. Its parts are shared with the loaded modules.

    Args:
        vlm (`PaliGemmaForConditionalGeneration`): the plain model.
        overrides (`dict`): fields of [`PaliGemmaFlowConfig`] that a plain PaliGemma does not have.

    Raises:
        ValueError: an override is not one of these fields.
    """
    if unknown := sorted(set(overrides) - _FLOW_FIELDS):
        raise ValueError(
            f"not a field of the action expert: {', '.join(unknown)}; there are {', '.join(sorted(_FLOW_FIELDS))}"
        )
    # A folder of this machine means nothing elsewhere.
    name = portable_name(vlm.name_or_path) if vlm.name_or_path else None
    origin = {"vlm_name_or_path": name, "vlm_revision": getattr(vlm.config, "_commit_hash", None)}
    config: Any = _convert(vlm.config, PaliGemmaFlowConfig, origin | overrides)
    # What anchors of it are said to be of.
    config._name_or_path = name or ""
    config._commit_hash = origin["vlm_revision"]
    return config


def plain_config(config: PaliGemmaFlowConfig) -> PaliGemmaConfig:
    """The configuration of the plain vision-language model inside; its parts are shared."""
    return _convert(config, PaliGemmaConfig, {})


def default_to_eager(config: PaliGemmaFlowConfig) -> None:
    """
    Sets `"eager"` attention wherever the configuration leaves the choice open.

    Raises:
        ValueError: `"sdpa"` was chosen for a language model that soft-caps its attention scores.
    """
    chosen = {"": config._attn_implementation or "eager"}
    for part in _PARTS:
        chosen[part] = getattr(config, part)._attn_implementation or "eager"
    _refuse_sdpa_with_softcapping(config, chosen["text_config"])
    config._attn_implementation = chosen


def _convert(config: PaliGemmaConfig, target: type[PaliGemmaConfig], additions: dict[str, Any]) -> PaliGemmaConfig:
    dropped = {"model_type", "architectures", *_FLOW_FIELDS}
    fields = {key: value for key, value in config.to_dict().items() if key not in dropped}
    parts = {part: getattr(config, part) for part in _PARTS}
    chosen = {"": config._attn_implementation} | {part: value._attn_implementation for part, value in parts.items()}
    converted = target(**fields | parts | additions)
    # Building a configuration forgets the attention implementation, also of the parts it shares with loaded modules.
    converted._attn_implementation = chosen
    return converted


def _refuse_sdpa_with_softcapping(config: PaliGemmaConfig, attn_implementation: str) -> None:
    text_config = config.get_text_config()
    cap = getattr(text_config, "attn_logit_softcapping", None)
    if attn_implementation == "sdpa" and cap is not None:
        raise ValueError(
            f"attn_implementation='sdpa' does not fit the language model '{text_config.model_type}': it soft-caps its "
            f"attention scores at {cap}, which scaled_dot_product_attention cannot do; use 'eager'"
        )
