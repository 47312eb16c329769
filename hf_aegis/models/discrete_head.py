"""Acting with the language-model head: FAST tokens generated after the prompt, decoded to a chunk of actions."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import GenerationConfig

from hf_aegis.data.fast_tokenizer import FASTTokenizer


if TYPE_CHECKING:
    from hf_aegis.models.modeling_paligemma_flow import PaliGemmaFlowForAction


@torch.no_grad()
def sample_discrete_actions(
    model: "PaliGemmaFlowForAction",
    action_tokenizer: FASTTokenizer | None,
    input_ids: Tensor,
    pixel_values: Tensor,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    max_new_tokens: int | None = None,
) -> Tensor:
    """
    Greedily generates FAST tokens up to the end-of-sequence token and decodes them.

    Args:
        model (`PaliGemmaFlowForAction`): trained on suffixes of `prepare_action_inputs(..., action_tokens=True)`.
        action_tokenizer (`FASTTokenizer`): the processor's.
        input_ids, attention_mask, token_type_ids (`Tensor` of shape `(B, T)`):
            Prompts, padded on any side. What is not prompt (`token_type_ids` of 1, an answer) is not read.
        pixel_values (`Tensor`): as of the model's `forward`.
        max_new_tokens (`int`, *optional*): `H · A + 1` when not given: one per coefficient, and the end.

    Returns:
        `Tensor` of shape `(B, H, A)`, float32, normalised; NaN where the tokens are no chunk, see
        [`FASTTokenizer.decode`].

    Raises:
        ValueError: `action_tokenizer` is missing or knows no vocabulary, or `max_new_tokens` is below 1.
    """
    if action_tokenizer is None:
        raise ValueError("head='fast' needs `action_tokenizer`, the processor's: processor.action_tokenizer")
    horizon, dimension = model.config.chunk_size, model.config.action_dim
    ends = _end_tokens(model)
    if max_new_tokens is None:
        max_new_tokens = horizon * dimension + 1
    elif max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
    action_tokenizer.vlm_ids()  # Fails before the generation rather than after.

    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    prompt = attention_mask.bool() if token_type_ids is None else attention_mask.bool() & (token_type_ids == 0)
    # What is no prompt goes to the left, where generation does not continue from it; the prompt keeps its order.
    order = prompt.long().argsort(dim=1, stable=True)
    generated = model.generate(
        input_ids=input_ids.gather(1, order),
        attention_mask=prompt.long().gather(1, order),
        token_type_ids=torch.zeros_like(input_ids),
        pixel_values=pixel_values,
        generation_config=GenerationConfig(
            do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=ends[0], use_cache=True
        ),
    )
    tokens = [action_tokenizer.from_vlm_ids(_until(row, ends)) for row in generated[:, input_ids.shape[1] :].tolist()]
    chunks = action_tokenizer.decode(tokens, time_horizon=horizon, action_dim=dimension)
    return torch.as_tensor(chunks, dtype=torch.float32, device=input_ids.device)


def _end_tokens(model: "PaliGemmaFlowForAction") -> list[int]:
    found = model.generation_config.eos_token_id
    if found is None:
        found = model.config.get_text_config().eos_token_id
    if found is None:
        raise ValueError("the model's generation_config has no eos_token_id: generation would not know where to end")
    return [found] if isinstance(found, int) else list(found)


def _until(ids: Sequence[int], ends: Sequence[int]) -> Sequence[int]:
    return next((ids[:position] for position, index in enumerate(ids) if index in ends), ids)
