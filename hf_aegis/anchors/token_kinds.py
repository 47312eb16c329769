"""Which kind of tokens the statistics of a vision-language model are reduced over: all, image or text."""

import torch
from torch import Tensor, nn

from hf_aegis.anchors.decoder_layers import unwrap_model


MASK_POLICIES = {"all": "attention_mask", "image": "image_tokens", "text": "text_tokens"}
"""
What a fingerprint calls the tokens that count. `"all"`: those attended according to the batch's `attention_mask`, or
all where a batch has none. `"image"`, `"text"`: of these, the ones whose id is, or is not, the model's image token.
"""

TOKENS = tuple(MASK_POLICIES)


def find_image_token_id(model: nn.Module) -> int:
    """
    The id of the tokens in whose place image features stand, from the configuration of the model or of one of its
    parts.

    Args:
        model (`nn.Module`): A Hugging Face model, wrapped or not.

    Raises:
        ValueError: If no configuration names such a token.
    """
    base = unwrap_model(model)
    for module in base.modules():
        config = getattr(module, "config", None)
        for name in ("image_token_id", "image_token_index"):
            if isinstance(value := getattr(config, name, None), int):
                return value
    raise ValueError(
        f"{type(base).__name__} has no image tokens: its configuration names no image_token_id; use tokens='all'"
    )


def select_tokens(
    mask: Tensor | None, input_ids: Tensor | None, tokens: str, image_token_id: int | None
) -> Tensor | None:
    """
    Restricts a mask to a kind of tokens.

    Args:
        mask (`Tensor` of shape `(B, T)`, *optional*): The attention mask; all tokens by default.
        input_ids (`Tensor` of shape `(B, T)`, *optional*): The tokens; not needed for `"all"`.
        tokens (`str`): `"all"`, `"image"` or `"text"`.
        image_token_id (`int`, *optional*): Of the model, see [`find_image_token_id`]; not needed for `"all"`.

    Returns:
        `Tensor` of shape `(B, T)`: `mask` itself for `"all"`, else booleans.

    Raises:
        ValueError: If `input_ids` are missing where they are needed, or do not have the mask's shape.
    """
    if tokens == "all":
        return mask
    if not isinstance(input_ids, Tensor):
        raise ValueError(f"tokens={tokens!r} needs input_ids, to tell image from text tokens, and found none")
    assert image_token_id is not None
    chosen = input_ids.eq(image_token_id) if tokens == "image" else input_ids.ne(image_token_id)
    if mask is None:
        return chosen
    if mask.shape != input_ids.shape:
        raise ValueError(
            f"tokens={tokens!r} needs input_ids of the attention mask's shape, to tell image from text tokens; found "
            f"{tuple(input_ids.shape)} and {tuple(mask.shape)}"
        )
    return torch.logical_and(chosen, mask.to(chosen.device) != 0)


def check_tokens(tokens: str) -> None:
    """
    Refuses an unknown kind of tokens.

    Raises:
        ValueError: If `tokens` is none of [`TOKENS`].
    """
    if tokens not in TOKENS:
        raise ValueError(f"tokens must be one of {TOKENS}, found {tokens!r}")
