"""Where a model's last hidden states lie on fixed questions (arXiv 2604.16067, drift-plane analysis)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hf_aegis.anchors import unwrap_model
from hf_aegis.data.vqa import VQA_PROMPT, VQACollator, VQASample
from hf_aegis.evaluation.evaluating import evaluating


def mean_hidden_states(
    model: nn.Module,
    processor: Any,
    samples: Sequence[VQASample],
    batch_size: int = 64,
    prompt: str = VQA_PROMPT,
) -> Tensor:
    """
    Last hidden states of a PaliGemma, after the final norm, averaged over each question's prompt: its image and text
    tokens without padding and without an answer. What an action expert and the output head read.

    The model runs in evaluation mode; modes and random state are restored.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The stock class, a subclass, or one wrapped by PEFT.
        processor (`PaliGemmaProcessor`): The model's processor.
        samples (`Sequence[VQASample]`): The questions.
        batch_size (`int`, *optional*, defaults to `64`): Samples per forward pass; results do not depend on it.
        prompt (`str`, *optional*, defaults to `"answer en {question}"`): What is asked.

    Returns:
        `torch.Tensor` of shape `(N, D)`: float32, on the CPU, in the order of `samples`.

    Raises:
        ValueError: If there are no samples, the batch size is not positive, or a sample is invalid.
    """
    if not samples:
        raise ValueError("mean_hidden_states needs at least one sample; found none.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; found {batch_size}.")
    collator = VQACollator(processor, prompt)
    means = []
    with evaluating(model) as device:
        # Below the output head, which would cost more than all layers of a small model. Adapters stay in the layers.
        backbone = unwrap_model(model).model
        for start in tqdm(range(0, len(samples), batch_size), desc="hidden states", leave=False, disable=None):
            inputs = collator.prompts(samples[start : start + batch_size]).to(device)
            states = backbone(**inputs, use_cache=False).last_hidden_state.float()  # type: ignore[operator]
            attended = inputs["attention_mask"].unsqueeze(-1)
            means.append(((states * attended).sum(1) / attended.sum(1)).cpu())
    return torch.cat(means)
