"""Discrete action tokens among the words of a vision-language model: where they lie, and a batch that ends in them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import BatchFeature

from hf_aegis.data.fast_tokenizer import SEGMENTATION_TOKENS, FASTTokenizer


LAST_SEGMENTATION_TOKEN = "<seg127>"


def bind_to_vlm(action_tokenizer: FASTTokenizer, tokenizer: Any) -> None:
    """
    Tells a FAST tokenizer the vocabulary of the vision-language model, which ends with the last <seg> token, as in
    openpi. (`len(tokenizer)` is one more where the `<image>` token was added behind, as in Google's PaliGemma 2.)

    Args:
        action_tokenizer (`FASTTokenizer`): its `vlm_vocab_size` is set.
        tokenizer (`PreTrainedTokenizerBase`): of a PaliGemma.

    Raises:
        ValueError: the tokenizer has no <seg> tokens, the FAST tokenizer belongs to another vocabulary, or its ids
            would reach tokens that every prompt needs.
    """
    size = tokenizer.get_vocab().get(LAST_SEGMENTATION_TOKEN, -1) + 1
    if size == 0:
        raise ValueError(f"the tokenizer has no {LAST_SEGMENTATION_TOKEN}: it is not a PaliGemma's")
    if action_tokenizer.vlm_vocab_size not in (None, size):
        raise ValueError(
            f"the FAST tokenizer belongs to a vocabulary of {action_tokenizer.vlm_vocab_size} tokens, "
            f"this vision-language model's has {size}"
        )
    # The newline ends every prompt.
    needed = {*tokenizer.all_special_ids, *tokenizer("\n", add_special_tokens=False)["input_ids"]}
    first = size - SEGMENTATION_TOKENS
    room = first - 1 - max((index for index in needed if index < first), default=-1)
    if action_tokenizer.num_tokens > room:
        taken = tokenizer.convert_ids_to_tokens(first - 1 - room)
        raise ValueError(
            f"{action_tokenizer.num_tokens} FAST tokens do not fit below the <seg> tokens: they would reach "
            f"{taken!r}, which prompts need; there is room for {max(room, 0)}"
        )
    action_tokenizer.vlm_vocab_size = size


def refuse_action_words(
    batch: BatchFeature, instructions: Sequence[str], action_tokenizer: FASTTokenizer, tokenizer: Any
) -> None:
    """
    Refuses prompts that hold an id which stands for an action: the model could not tell one from the other.

    Args:
        batch (`BatchFeature` of NumPy arrays): `input_ids` and `token_type_ids` of shape `(B, T)`.
        instructions (`Sequence[str]`): of the `B` samples.
        action_tokenizer (`FASTTokenizer`): bound to the vocabulary of `tokenizer`.
        tokenizer (`PreTrainedTokenizerBase`): of the vision-language model.

    Raises:
        ValueError: there is such an id; the message names the word and the instruction.
    """
    ids = action_tokenizer.vlm_ids()
    words, prompt = batch["input_ids"], batch["token_type_ids"] == 0
    taken = np.argwhere(prompt & (words >= ids.start) & (words < ids.stop))
    if len(taken):
        sample, position = taken[0].tolist()
        index = int(words[sample, position])
        raise ValueError(
            f"the instruction {instructions[sample]!r} holds {tokenizer.convert_ids_to_tokens(index)!r} (id {index}), "
            f"which stands for an action: the FAST tokens take the ids {ids.start} to {ids.stop - 1}"
        )


def append_suffix(batch: BatchFeature, suffixes: Sequence[Sequence[int]], pad_token_id: int) -> None:
    """
    Puts ids to learn behind the prompts, in place: `input_ids`, `attention_mask`, `token_type_ids` (1 on the suffix)
    and `labels` (-100 elsewhere), padded on the right, as the stock processor does with a suffix of text.

    Args:
        batch (`BatchFeature` of NumPy arrays): prompts of shape `(B, T)`, padded on the right.
        suffixes (`Sequence[Sequence[int]]`): of the `B` samples.
        pad_token_id (`int`): what fills `input_ids`.
    """
    prompts = batch["attention_mask"].sum(axis=1)
    width = max(int(length) + len(suffix) for length, suffix in zip(prompts, suffixes, strict=True))
    filling = {"input_ids": pad_token_id, "attention_mask": 0, "token_type_ids": 0, "labels": -100}
    arrays = {key: np.full((len(suffixes), width), value, dtype=np.int64) for key, value in filling.items()}
    for row, (length, suffix) in enumerate(zip(prompts.tolist(), suffixes, strict=True)):
        for key in ("input_ids", "attention_mask", "token_type_ids"):
            arrays[key][row, :length] = batch[key][row, :length]
        answer = slice(length, length + len(suffix))
        arrays["attention_mask"][row, answer] = arrays["token_type_ids"][row, answer] = 1
        arrays["input_ids"][row, answer] = arrays["labels"][row, answer] = suffix
    batch.update(arrays)
