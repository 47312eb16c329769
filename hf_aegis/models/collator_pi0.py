"""From the items of a robot dataset to a batch for transformers' π0."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import BatchFeature, PI0Processor

from hf_aegis.models.robot_items import check_items, stack_feature


@dataclass
class PI0Collator:
    """
    Collates items in robot units, as `LiberoDataset(..., normalize=False)` yields them, for
    [`~transformers.PI0ForConditionalGeneration`], whose own processor normalises them.

    The model draws noise and time itself. It has no mask for steps past the end of an episode: they count in its loss
    with the last action repeated, and so do the zeros that actions are padded with to `max_state_dim`, as in openpi.

    Args:
        processor (`PI0Processor`): With the statistics of the training data, see [`~models.pi0_processor`].

    Raises:
        ValueError: The processor has no statistics.
    """

    processor: PI0Processor

    def __post_init__(self) -> None:
        names = ("state_mean", "state_std", "actions_mean", "actions_std")
        if missing := [name for name in names if getattr(self.processor, name) is None]:
            raise ValueError(
                f"the processor has no {', '.join(missing)} to normalise with: make it by "
                "pi0_processor(name, dataset.statistics)"
            )

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> BatchFeature:
        """
        Args:
            items (`Sequence[Mapping]`):
                Each with `images` (its cameras: RGB, uint8, `(h, w, 3)`), `instruction` (`str`), `state` (`(S,)`),
                `actions` (`(H, A)`) and `action_is_pad` (`(H,)`, bool).

        Returns:
            `BatchFeature`: `input_ids` and `attention_mask` `(B, T)`, padded on the right, `pixel_values`
            `(B, n, 3, h, w)`, `pixel_attention_mask` `(B, n)`, `state` `(B, 32)` and `actions` `(B, H, 32)`.

        Raises:
            ValueError: An item lacks a key, items differ in shape, state or actions are not of the processor's
                statistics, or chunks not of its length.
        """
        check_items(items)
        processor: Any = self.processor
        state, actions = stack_feature(items, "state"), stack_feature(items, "actions")
        # The processor reshapes what does not fit, and would mix steps and samples.
        expected = {
            "state": (len(items), len(processor.state_mean)),
            "actions": (len(items), processor.chunk_size, len(processor.actions_mean)),
        }
        for name, values in (("state", state), ("actions", actions)):
            if values.shape != expected[name]:
                raise ValueError(f"`{name}` must have shape {expected[name]}, found {values.shape}")
        return processor(
            images=[list(item["images"]) for item in items],
            text=[_clean(item["instruction"]) for item in items],
            state=state,
            actions=actions,
            padding="longest",
            padding_side="right",
            return_tensors="pt",
        )


def _clean(instruction: str) -> str:
    return " ".join(instruction.replace("_", " ").split())
