"""Cross-entropy and accuracy of a vision-language model on a fixed set of questions (arXiv 2604.16067, evaluation)."""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from hf_aegis.data.vqa import VQA_PROMPT, VQACollator, VQASample
from hf_aegis.data.vqa_samples import VQAAnnotation, VQASamples
from hf_aegis.evaluation.evaluating import evaluating
from hf_aegis.evaluation.vqa_scores import VQARecord, VQAResult, VQAScore


__all__ = ["VQAHoldout", "VQAResult", "VQAScore", "answer_length", "fingerprint"]


# Tokens of articles and punctuation that an answer may hold besides a ground truth.
_VANISHING = 8


# Generation settings that make a token more or less likely than the model does, or end an answer early; each with the
# value that does nothing.
_BENDING: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "guidance_scale": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    **dict.fromkeys(("min_new_tokens", "bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens")),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty")),
    **dict.fromkeys(("watermarking_config", "stop_strings")),
}


class VQAHoldout:
    """
    A fixed set of questions, preprocessed once, on which models are compared.

    The samples are tokenised and their images processed here and never again, so every condition and every evaluation
    sees the same tensors in the same order. Evaluating leaves the model and the random number generators as they were:
    modes of all modules, configurations and gradients.

    Args:
        samples (`Sequence[VQASample]`): the questions.
        processor (`PaliGemmaProcessor`): the model's processor.
        prompt (`str`, *optional*, defaults to `"answer en {question}"`): what is asked.
        batch_size (`int`, *optional*, defaults to `64`): samples per forward pass; results do not depend on it.
        max_new_tokens (`int`, *optional*):
            where generation stops; by default after [`answer_length`] tokens of these questions.
        progress (`bool`, *optional*, defaults to `True`): whether bars are shown on a terminal.

    Attributes:
        fingerprint (`str`): SHA-256 of images, questions, answers and prompt; equal for equal hold-outs.

    Raises:
        ValueError: if there are no samples, the batch size is not positive, or a sample is invalid.

    Example:

    ```python
    >>> holdout = VQAHoldout(load_easy_vqa("test", max_samples=100, seed=0), processor)
    >>> holdout.evaluate(model).accuracy
    ```
    """

    def __init__(
        self,
        samples: Sequence[VQASample],
        processor: Any,
        prompt: str = VQA_PROMPT,
        batch_size: int = 64,
        max_new_tokens: int | None = None,
        progress: bool = True,
    ):
        if not samples:
            raise ValueError("VQAHoldout needs at least one sample; found none.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; found {batch_size}.")
        # Decoded photographs would fill the memory: those of a lazy set stay encoded.
        self.samples = samples if isinstance(samples, VQASamples) else list(samples)
        self.batch_size = batch_size
        self.progress = progress
        self._tokenizer = processor.tokenizer
        self._rows: list[dict[str, torch.Tensor]] = []
        # Several questions share an image: each image is kept once.
        self._images: list[torch.Tensor] = []
        self._image_of: list[int] = []
        self._records: list[VQARecord] = []
        collator, positions = VQACollator(processor, prompt), {}
        for indices in self._batches("VQA hold-out"):
            chunk = list(self.samples[indices[0] : indices[-1] + 1])
            inputs = collator(chunk)
            pixel_values, attention_mask = inputs.pop("pixel_values"), inputs.pop("attention_mask").bool()
            for row, sample in enumerate(chunk):
                self._rows.append({key: inputs[key][row][attention_mask[row]] for key in inputs})
                image = _image_digest(sample)
                if image not in positions:
                    positions[image] = len(self._images)
                    self._images.append(pixel_values[row].clone())
                self._image_of.append(positions[image])
                self._records.append(VQARecord(sample.annotation, _digest(image, sample.annotation)))
        self.fingerprint = fingerprint(prompt, self._records)
        if max_new_tokens is None:
            max_new_tokens = answer_length(self._tokenizer, [record.annotation for record in self._records])
        self._max_new_tokens = max_new_tokens

    def __len__(self) -> int:
        return len(self.samples)

    def evaluate(self, model: torch.nn.Module) -> VQAResult:
        """
        Cross-entropy and accuracy of a PaliGemma model: the stock class, a subclass, or one wrapped by PEFT.

        Args:
            model (`PreTrainedModel` or `PeftModel`): runs on its own device and in its own dtype.

        Returns:
            `VQAResult`: both scores, in total and by question type.
        """
        return VQAResult.of(self.ask(model))

    def evaluate_cross_entropy(self, model: torch.nn.Module) -> VQAResult:
        """Teacher-forced cross-entropy alone (see [`VQAScore`] for the mean that is taken); see `evaluate`."""
        return VQAResult.of(self.ask(model, accuracy=False))

    def evaluate_accuracy(self, model: torch.nn.Module) -> VQAResult:
        """Accuracy of greedily generated answers alone (see [`VQAScore`]), and the answers; see `evaluate`."""
        return VQAResult.of(self.ask(model, cross_entropy=False))

    def ask(self, model: torch.nn.Module, cross_entropy: bool = True, accuracy: bool = True) -> list[VQARecord]:
        """What comes of each question, in their order; see `evaluate`."""
        if not cross_entropy:
            return self._answered(model, self._records)
        records, settled = self._teacher_forced_records(model)
        return self._answered(model, records, settled) if accuracy else records

    def _teacher_forced_records(self, model: torch.nn.Module) -> tuple[list[VQARecord], list[bool]]:
        """
        The records with their cross-entropies, and whether each of the ground truth's tokens, its end-of-sequence
        token included, is the likeliest one after those before it: greedy generation then gives just these tokens.
        """
        values: list[float] = []
        settled: list[bool] = []
        with evaluating(model) as device:
            for indices in self._batches("VQA cross-entropy"):
                inputs = self._teacher_forced(indices, device)
                labels = inputs.pop("labels")[:, 1:]
                # The head over the whole vocabulary costs most: it runs only where some answer token comes next.
                answered = (labels != -100).any(0).nonzero()[:, 0]
                logits = model(**inputs, logits_to_keep=answered, use_cache=False).logits
                labels = labels[:, answered]
                losses = cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=-100, reduction="none")
                values += (losses.sum(1) / (labels != -100).sum(1)).tolist()
                settled += ((logits.argmax(-1) == labels) | (labels == -100)).all(1).tolist()
        records = [
            dataclasses.replace(record, cross_entropy=value)
            for record, value in zip(self._records, values, strict=True)
        ]
        return records, settled

    def _answered(
        self, model: torch.nn.Module, records: list[VQARecord], settled: Sequence[bool] = ()
    ) -> list[VQARecord]:
        """Generates the answers, but for those that are settled to be the ground truth."""
        predictions: dict[int, str] = {}
        ends = _end_tokens(model)
        for index, known in enumerate(settled):
            labels = self._rows[index]["labels"]
            tokens = labels[labels != -100]
            if known and len(tokens) <= self._max_new_tokens and int(tokens[-1]) in ends:
                predictions[index] = self._tokenizer.decode(tokens, skip_special_tokens=True)
        with evaluating(model) as device:
            for indices in self._batches("VQA accuracy", [i for i in range(len(self)) if i not in predictions]):
                inputs = self._prompts(indices, device)
                tokens = model.generate(  # type: ignore[operator]
                    **inputs, max_new_tokens=self._max_new_tokens, do_sample=False, num_beams=1, use_cache=True
                )
                answers = tokens[:, inputs["input_ids"].shape[1] :]
                predictions |= zip(
                    indices, self._tokenizer.batch_decode(answers, skip_special_tokens=True), strict=True
                )
        return [record.answered(predictions[index]) for index, record in enumerate(records)]

    def _batches(self, description: str, among: Sequence[int] | None = None) -> Iterator[list[int]]:
        among = range(len(self)) if among is None else among
        starts = range(0, len(among), self.batch_size)
        for start in tqdm(starts, desc=description, leave=False, disable=None if self.progress else True):
            yield list(among[start : start + self.batch_size])

    def _teacher_forced(self, indices: list[int], device: torch.device) -> dict[str, torch.Tensor]:
        return self._pad([self._rows[index] for index in indices], "right", indices, device)

    def _prompts(self, indices: list[int], device: torch.device) -> dict[str, torch.Tensor]:
        rows = []
        for index in indices:
            prefix = self._rows[index]["token_type_ids"] == 0
            rows.append({key: value[prefix] for key, value in self._rows[index].items() if key != "labels"})
        return self._pad(rows, "left", indices, device)

    def _pad(
        self, rows: list[dict[str, torch.Tensor]], side: str, indices: list[int], device: torch.device
    ) -> dict[str, torch.Tensor]:
        padding = {"input_ids": self._tokenizer.pad_token_id, "token_type_ids": 0, "labels": -100, "attention_mask": 0}
        rows = [{**row, "attention_mask": torch.ones_like(row["input_ids"])} for row in rows]
        batch = {
            key: pad_sequence([row[key] for row in rows], True, padding[key], padding_side=side) for key in rows[0]
        }
        batch["pixel_values"] = torch.stack([self._images[self._image_of[index]] for index in indices])
        return {key: value.to(device) for key, value in batch.items()}


def _end_tokens(model: torch.nn.Module) -> set[int]:
    """
    The tokens at which the model's greedy generation ends; none if the model's own generation settings bend it, so
    that the likeliest token is not always what comes next.
    """
    settings = getattr(model, "generation_config", None)
    if any(getattr(settings, name, None) not in (None, neutral) for name, neutral in _BENDING.items()):
        return set()
    ends = getattr(settings, "eos_token_id", None)
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def fingerprint(prompt: str, records: Sequence[VQARecord]) -> str:
    """SHA-256 of a prompt and of the images, questions and answers asked with it, in their order."""
    digest = hashlib.sha256(prompt.encode())
    for record in records:
        digest.update(record.digest.encode())
    return digest.hexdigest()


def answer_length(tokenizer: Any, annotations: Iterable[VQAAnnotation]) -> int:
    """
    How many tokens an answer may need: those of the longest ground truth and its end-of-sequence token.

    Where there is one ground truth, a longer answer counts as wrong, whatever follows. VQA accuracy drops articles and
    punctuation, so that `"red, the"` still equals `"red"` and `"red, the blue"` does not: questions with several
    annotators' answers get 8 tokens more, which tell such answers apart unless they hold more articles and marks.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the model's.
        annotations (`Iterable[VQAAnnotation]`): the questions, at least one.
    """
    # Many questions share their few answers: each is tokenised once.
    margins: dict[str, int] = {}
    for annotation in annotations:
        margin = 0 if annotation.answers is None else _VANISHING
        for text in (annotation.answer, *(annotation.answers or ())):
            margins[text] = max(margin, margins.get(text, 0))
    tokens = tokenizer(list(margins), add_special_tokens=False)["input_ids"]
    return max(len(row) + margin for row, margin in zip(tokens, margins.values(), strict=True)) + 1


def sample_digest(sample: VQASample) -> str:
    """SHA-256 of a sample's decoded image, question and ground truth, as a [`VQARecord`] holds it."""
    return _digest(_image_digest(sample), sample.annotation)


def _image_digest(sample: VQASample) -> str:
    return hashlib.sha256(repr(sample.image.size).encode() + sample.image.tobytes()).hexdigest()


def _digest(image: str, annotation: VQAAnnotation) -> str:
    truth = (image, annotation.question, annotation.answer, annotation.answers)
    return hashlib.sha256(repr(truth).encode()).hexdigest()
