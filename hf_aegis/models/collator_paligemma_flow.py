"""From the items of a robot dataset to a batch for `PaliGemmaFlowForAction`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import BatchFeature

from hf_aegis.models.processing_paligemma_flow import PaliGemmaFlowProcessor
from hf_aegis.models.robot_items import check_items, stack_feature


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
        check_items(items)
        return self.processor.prepare_action_inputs(
            images=[item["images"] for item in items],
            text=[item["instruction"] for item in items],
            state=stack_feature(items, "state"),
            actions=stack_feature(items, "actions"),
            action_is_pad=stack_feature(items, "action_is_pad"),
            action_tokens=self.action_tokens,
        )
