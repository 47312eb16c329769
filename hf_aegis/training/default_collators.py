"""The collators of a `PaliGemmaFlowForAction` whose user gave none."""

from collections.abc import Callable
from typing import Any

from torch import nn

from hf_aegis.anchors.decoder_layers import unwrap_model


def question_collator(model: nn.Module, processor: Any) -> Callable[[list[Any]], Any] | None:
    """
    For samples of questions; `None` for another model.

    Raises:
        ValueError: If there is no processor to make it from.
    """
    from hf_aegis.data.vqa import VQACollator
    from hf_aegis.models import PaliGemmaFlowForAction

    if not isinstance(unwrap_model(model), PaliGemmaFlowForAction):
        return None
    if processor is None:
        raise ValueError("replay_dataset needs a collator of its samples: give processing_class or replay_collator")
    return VQACollator(processor)


def action_collator(model: nn.Module, processor: Any, dataset: Any) -> tuple[Any, Callable[[list[Any]], Any] | None]:
    """For samples of robot data, with the processor it uses; for another model the given processor and `None`."""
    from hf_aegis.models import PaliGemmaFlowCollator, PaliGemmaFlowForAction, PaliGemmaFlowProcessor

    base = unwrap_model(model)
    if not isinstance(base, PaliGemmaFlowForAction):
        return processor, None
    if processor is None:
        processor = PaliGemmaFlowProcessor.from_vlm_processor(
            str(base.name_or_path),
            statistics=getattr(dataset, "statistics", None),
            cameras=getattr(dataset, "cameras", None),
            state_features=getattr(dataset, "state_features", None),
            pictures=getattr(dataset, "pictures", None),
        )
    return processor, PaliGemmaFlowCollator(processor)
