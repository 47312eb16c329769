"""Cross-entropy and accuracy of a vision-language model on a fixed set of questions (arXiv 2604.16067, evaluation)."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from hf_aegis.data.vqa import VQA_PROMPT, VQACollator, VQASample
from hf_aegis.functional.vqa_answers import exact_match


@dataclasses.dataclass(frozen=True)
class VQAScore:
    """
    Scores over a set of samples.

    Args:
        count (`int`): number of samples.
        cross_entropy (`float`, *optional*):
            Teacher-forced cross-entropy in nats per token: the mean over each answer's tokens (its end-of-sequence
            token included), then the mean over samples, so that long answers weigh no more than short ones.
        accuracy (`float`, *optional*): share of answers generated greedily that match exactly.
    """

    count: int
    cross_entropy: float | None = None
    accuracy: float | None = None


@dataclasses.dataclass(frozen=True)
class VQAResult(VQAScore):
    """
    Scores over all samples, and of each question type.

    Args:
        by_type (`dict[str, VQAScore]`): scores per question type, sorted by name; empty if samples carry no type.
        predictions (`list[str]`): the generated answers in the hold-out's order; empty if none were generated.
    """

    by_type: dict[str, VQAScore] = dataclasses.field(default_factory=dict)
    predictions: list[str] = dataclasses.field(default_factory=list, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON, without the predictions; what was not measured is left out."""
        result = dataclasses.asdict(self)
        del result["predictions"]
        result["by_type"] = {name: _measured(scores) for name, scores in result["by_type"].items()}
        return _measured(result)


def _measured(scores: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in scores.items() if value is not None}


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
    ):
        if not samples:
            raise ValueError("VQAHoldout needs at least one sample; found none.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; found {batch_size}.")
        self.samples = list(samples)
        self.batch_size = batch_size
        self._tokenizer = processor.tokenizer
        self._rows: list[dict[str, torch.Tensor]] = []
        # Several questions share an image: each image is kept once.
        self._images: list[torch.Tensor] = []
        self._image_of: list[int] = []
        digest = hashlib.sha256(prompt.encode())
        collator, positions = VQACollator(processor, prompt), {}
        chunks = [self.samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
        for chunk in tqdm(chunks, desc="VQA hold-out", leave=False, disable=None):
            inputs = collator(chunk)
            pixel_values, attention_mask = inputs.pop("pixel_values"), inputs.pop("attention_mask").bool()
            for row, sample in enumerate(chunk):
                self._rows.append({key: inputs[key][row][attention_mask[row]] for key in inputs})
                if id(sample.image) not in positions:
                    positions[id(sample.image)] = len(self._images)
                    self._images.append(pixel_values[row].clone())
                    digest.update(repr(sample.image.size).encode() + sample.image.tobytes())
                self._image_of.append(positions[id(sample.image)])
                digest.update(repr((self._image_of[-1], sample.question, sample.answer)).encode())
        self.fingerprint = digest.hexdigest()
        # An answer longer than every ground truth is wrong whatever follows, so nothing beyond is generated.
        self._max_new_tokens = max(int((row["labels"] != -100).sum()) for row in self._rows)

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
        teacher_forced, generated = self.evaluate_cross_entropy(model), self.evaluate_accuracy(model)
        by_type = {
            name: dataclasses.replace(scores, cross_entropy=teacher_forced.by_type[name].cross_entropy)
            for name, scores in generated.by_type.items()
        }
        return dataclasses.replace(generated, cross_entropy=teacher_forced.cross_entropy, by_type=by_type)

    def evaluate_cross_entropy(self, model: torch.nn.Module) -> VQAResult:
        """Teacher-forced cross-entropy alone (see [`VQAScore`] for the mean that is taken); see `evaluate`."""
        values: list[float] = []
        with _evaluating(model) as device:
            for indices in self._batches("VQA cross-entropy"):
                inputs = self._teacher_forced(indices, device)
                labels = inputs.pop("labels")[:, 1:]
                # The head over the whole vocabulary costs most: it runs only where some answer token comes next.
                answered = (labels != -100).any(0).nonzero()[:, 0]
                logits = model(**inputs, logits_to_keep=answered, use_cache=False).logits
                labels = labels[:, answered]
                losses = cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=-100, reduction="none")
                values += (losses.sum(1) / (labels != -100).sum(1)).tolist()
        return self._result("cross_entropy", values)

    def evaluate_accuracy(self, model: torch.nn.Module) -> VQAResult:
        """Exact match of greedily generated answers alone, and the answers themselves; see `evaluate`."""
        predictions: list[str] = []
        with _evaluating(model) as device:
            for indices in self._batches("VQA accuracy"):
                inputs = self._prompts(indices, device)
                # Training turns the cache off in the model's configuration; generation needs it back.
                tokens = model.generate(  # type: ignore[operator]
                    **inputs, max_new_tokens=self._max_new_tokens, do_sample=False, num_beams=1, use_cache=True
                )
                answers = tokens[:, inputs["input_ids"].shape[1] :]
                predictions += self._tokenizer.batch_decode(answers, skip_special_tokens=True)
        pairs = zip(predictions, self.samples, strict=True)
        values = [float(exact_match(prediction, sample.answer)) for prediction, sample in pairs]
        return dataclasses.replace(self._result("accuracy", values), predictions=predictions)

    def _batches(self, description: str) -> Iterator[list[int]]:
        starts = range(0, len(self), self.batch_size)
        for start in tqdm(starts, desc=description, leave=False, disable=None):
            yield list(range(start, min(start + self.batch_size, len(self))))

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

    def _result(self, measure: str, values: list[float]) -> VQAResult:
        groups: dict[str, list[float]] = {}
        for sample, value in zip(self.samples, values, strict=True):
            if sample.question_type is not None:
                groups.setdefault(sample.question_type, []).append(value)
        total = VQAScore(len(values), **{measure: _mean(values)})
        by_type = {name: VQAScore(len(group), **{measure: _mean(group)}) for name, group in sorted(groups.items())}
        return VQAResult(total.count, total.cross_entropy, total.accuracy, by_type)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients; afterwards every module's own mode and the random state are as before."""
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield device
    finally:
        for module, training in modes:
            module.training = training
