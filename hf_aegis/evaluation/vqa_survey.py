"""Asking many questions once: in batches, in bounded memory, and continued where a killed run left off."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hf_aegis.data.vqa import VQA_PROMPT, VQASample
from hf_aegis.data.vqa_samples import annotations
from hf_aegis.evaluation.prediction_file import PredictionFile
from hf_aegis.evaluation.vqa import VQAHoldout, answer_length, fingerprint
from hf_aegis.evaluation.vqa_scores import VQARecord, VQAResult


# Texts looked at together.
_TEXTS = 4096


def survey(
    load_model: Callable[[], torch.nn.Module],
    samples: Sequence[VQASample],
    processor: Any,
    *,
    prompt: str = VQA_PROMPT,
    batch_size: int = 64,
    cross_entropy: bool = True,
    accuracy: bool = True,
    predictions: Path | None = None,
    settings: dict[str, Any] | None = None,
) -> tuple[VQAResult, str]:
    """
    Scores of a model on questions, as [`VQAHoldout`] gives them with the same batch size, without keeping images or
    inputs.

    Args:
        load_model (`Callable`): gives the model; not called if every question has been answered before.
        samples (`Sequence[VQASample]`): the questions.
        processor (`PaliGemmaProcessor`): the model's processor.
        prompt (`str`, *optional*, defaults to `"answer en {question}"`): what is asked.
        batch_size (`int`, *optional*, defaults to `64`): questions per forward pass.
        cross_entropy (`bool`, *optional*, defaults to `True`): whether cross-entropy is measured.
        accuracy (`bool`, *optional*, defaults to `True`): whether answers are generated and scored.
        predictions (`Path`, *optional*):
            a file of JSON lines to which each batch is written as soon as it is answered, and from which a killed run
            continues, once the images of the questions answered before have been found to be the same; see
            [`~evaluation.prediction_file.PredictionFile`].
        settings (`dict[str, Any]`, *optional*): what the answers depend on besides the arguments here; a file that
            was begun with others is refused.

    Returns:
        `tuple[VQAResult, str]`: the scores, and the fingerprint that a [`VQAHoldout`] of the same questions has.

    Raises:
        ValueError: if there are no samples, a sample is invalid, or `predictions` belongs to another survey.
    """
    if not len(samples):
        raise ValueError("A survey needs at least one question; found none.")
    # One pass over the texts finds a bad row before hours are spent on those before it.
    longest = max(
        answer_length(processor.tokenizer, annotations(samples[start : start + _TEXTS]))
        for start in range(0, len(samples), _TEXTS)
    )
    settings = {
        **(settings or {}),
        "prompt": prompt,
        "batch_size": batch_size,
        "cross_entropy": cross_entropy,
        "accuracy": accuracy,
        "max_new_tokens": longest,
        "count": len(samples),
    }
    records: list[VQARecord] = []
    file = PredictionFile(predictions, settings, batch_size) if predictions is not None else None
    if file is not None:
        file.check(samples)
        records += file.records
    if len(records) == len(samples):
        return VQAResult.of(records), fingerprint(prompt, records)
    model = load_model()
    with tqdm(total=len(samples), initial=len(records), desc="VQA", unit="question", disable=None) as bar:
        for start in range(len(records), len(samples), batch_size):
            batch = samples[start : start + batch_size]
            holdout = VQAHoldout(batch, processor, prompt, batch_size, max_new_tokens=longest, progress=False)
            answered = holdout.ask(model, cross_entropy=cross_entropy, accuracy=accuracy)
            if file is not None:
                file.append(answered)
            records += answered
            bar.update(len(answered))
    return VQAResult.of(records), fingerprint(prompt, records)
