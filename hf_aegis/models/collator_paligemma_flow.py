"""From the items of a robot dataset to a batch for `PaliGemmaFlowForAction`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import BatchFeature

from hf_aegis.models.processing_paligemma_flow import PaliGemmaFlowProcessor


_KEYS = ("images", "instruction", "state", "actions", "action_is_pad")


@dataclass
class PaliGemmaFlowCollator:
    """
    Collates items whose state and actions are normalised already, as `LiberoDataset` yields them, padding prompts on
    the right.

    Args:
        processor (`PaliGemmaFlowProcessor`): tokenizer and image processor.
        action_tokens (`bool`, *optional*, defaults to `False`):
            Whether the batch also holds the actions as FAST tokens for the language model to learn (`labels`).
    """

    processor: PaliGemmaFlowProcessor
    action_tokens: bool = False

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> BatchFeature:
        """
        Args:
            items (`Sequence[Mapping]`):
                Each with `images` (its cameras: RGB, uint8, `(h, w, 3)`), `instruction` (`str`), `state` (`(S,)`),
                `actions` (`(H, A)`) and `action_is_pad` (`(H,)`, bool).

        Returns:
            The batch of [`~PaliGemmaFlowProcessor.prepare_action_inputs`].

        Raises:
            ValueError: an item lacks a key, items differ in shape, or as of `prepare_action_inputs`.
        """
        for index, item in enumerate(items):
            if missing := [key for key in _KEYS if key not in item]:
                raise ValueError(f"item {index} lacks {', '.join(missing)}; found {', '.join(map(str, item))}")
        return self.processor.prepare_action_inputs(
            images=[item["images"] for item in items],
            text=[item["instruction"] for item in items],
            state=_stack(items, "state"),
            actions=_stack(items, "actions"),
            action_is_pad=_stack(items, "action_is_pad"),
            action_tokens=self.action_tokens,
        )


def _stack(items: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    arrays = [np.asarray(item[key]) for item in items]
    for index, array in enumerate(arrays):
        if array.shape != arrays[0].shape:
            raise ValueError(f"`{key}` of item {index} has shape {array.shape}, of item 0 {arrays[0].shape}")
    return np.stack(arrays)
