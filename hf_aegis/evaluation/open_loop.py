"""Open-loop action error: sampled action chunks against recorded ones, without a robot or a simulator."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hf_aegis.evaluation.evaluating import evaluating


# What `sample_actions` takes of a collated batch.
_OBSERVATION = ("input_ids", "pixel_values", "attention_mask", "token_type_ids", "state")


def open_loop_error(
    model: Any,
    dataset: Any,
    collator: Callable[[list[Any]], Any],
    indices: Sequence[int],
    batch_size: int = 64,
    seed: int = 0,
    **options: Any,
) -> dict[str, float]:
    """
    Mean squared error of the actions that a policy samples, over the steps that are not padding.

    Args:
        model ([`~models.PaliGemmaFlowForAction`]): The policy, possibly wrapped by PEFT; left as it was.
        dataset (`Sequence`): Items with normalised actions, as of [`~data.LiberoDataset`].
        collator (`Callable`): From a list of items to a batch without action tokens.
        indices (`Sequence[int]`): Which items.
        batch_size (`int`, *optional*, defaults to `64`): Items per batch; part of how noise is drawn.
        seed (`int`, *optional*, defaults to `0`): Of the noise that the flow starts from.
        options: Of `sample_actions`, such as `head`.

    Returns:
        `dict`: `action_mse`, in squared normalised units, over the chunks that were sampled whole (NaN if none was);
        `failures`, the number of chunks that were not: those with a value that is not finite.
    """
    squared, count, failures = 0.0, 0, 0
    with evaluating(model) as device:
        generator = torch.Generator(device).manual_seed(seed)
        starts = range(0, len(indices), batch_size)
        for start in tqdm(starts, desc="open-loop actions", leave=False, disable=None):
            batch = collator([dataset[index] for index in indices[start : start + batch_size]])
            observation = {key: batch[key].to(device) for key in _OBSERVATION if key in batch}
            if options.get("head", "flow") == "flow":
                options["generator"] = generator
            sampled: Tensor = model.sample_actions(**observation, **options).cpu().double()
            whole = torch.isfinite(sampled).flatten(1).all(dim=1)
            counted = whole[:, None] & ~batch["action_is_pad"]
            error = (sampled - batch["actions"].double()).square()
            squared += float(error[counted].sum())
            count += int(counted.sum()) * sampled.shape[-1]
            failures += int((~whole).sum())
    return {"action_mse": squared / count if count else float("nan"), "failures": failures}
