"""What came of each question, and the scores over many of them."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from hf_aegis.data.vqa_samples import VQAAnnotation
from hf_aegis.functional.bootstrap import bootstrap_interval
from hf_aegis.functional.vqa_answers import any_match, exact_match, vqa_accuracy
from hf_aegis.json_files import require_keys


@dataclasses.dataclass(frozen=True)
class VQARecord:
    """
    One question and what came of it.

    Args:
        annotation ([`VQAAnnotation`]): what was asked, and the ground truth.
        digest (`str`): SHA-256 of image, question and ground truth.
        cross_entropy (`float`, *optional*): of the ground-truth answer, in nats per token.
        prediction (`str`, *optional*): the answer generated greedily.
        accuracy (`float`, *optional*): see [`VQAScore`].
        any_match (`float`, *optional*): see [`VQAScore`].
    """

    annotation: VQAAnnotation
    digest: str
    cross_entropy: float | None = None
    prediction: str | None = None
    accuracy: float | None = None
    any_match: float | None = None

    def answered(self, prediction: str) -> "VQARecord":
        """This question with a generated answer and its scores."""
        answers = self.annotation.answers
        if answers is None:
            accuracy, matched = float(exact_match(prediction, self.annotation.answer)), None
        else:
            accuracy, matched = vqa_accuracy(prediction, answers), float(any_match(prediction, answers))
        return dataclasses.replace(self, prediction=prediction, accuracy=accuracy, any_match=matched)

    def to_dict(self) -> dict[str, Any]:
        """Flat, for a JSON line; what is not known is left out."""
        values = dataclasses.asdict(self)
        return {key: value for key, value in (values.pop("annotation") | values).items() if value is not None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "VQARecord":
        """
        The record of [`~VQARecord.to_dict`]. What the prediction scores is computed anew, not read.

        Raises:
            ValueError: if a key is missing, unknown or of another type, or there are too few annotators' answers.
        """
        if unknown := sorted(values.keys() - _STORED.keys() - _COMPUTED):
            raise ValueError(f"unknown keys {unknown}")
        require_keys(values, _STORED, "the question")
        names = {field.name for field in dataclasses.fields(VQAAnnotation)}
        annotation = {key: value for key, value in values.items() if key in names}
        if (answers := annotation.get("answers")) is not None:
            if not all(isinstance(answer, str) for answer in answers):
                raise ValueError(f"'answers' must be texts; found {answers}")
            annotation["answers"] = tuple(answers)
        found = {key: value for key, value in values.items() if key not in names | _COMPUTED}
        record = cls(VQAAnnotation(**annotation), **found)
        return record if record.prediction is None else record.answered(record.prediction)


@dataclasses.dataclass(frozen=True)
class VQAScore:
    """
    Scores over a set of samples. What is not finite for a sample is not finite in the mean: neither hidden nor an
    error, since a training run that diverges is evaluated too.

    Args:
        count (`int`): number of samples.
        cross_entropy (`float`, *optional*):
            Teacher-forced cross-entropy in nats per token: the mean over each answer's tokens (its end-of-sequence
            token included), then the mean over samples, so that long answers weigh no more than short ones.
        accuracy (`float`, *optional*):
            Of answers generated greedily: the published VQA accuracy
            ([`~functional.vqa_answers.vqa_accuracy`]) where a sample has the answers of all annotators, and exact
            match ([`~functional.vqa_answers.exact_match`]) where it has one ground truth.
        any_match (`float`, *optional*):
            Share of answers that any annotator gave ([`~functional.vqa_answers.any_match`]); only where every sample
            has the answers of all annotators.
        records (`list[VQARecord]`): each question and what came of it, in the order asked.
    """

    count: int
    cross_entropy: float | None = None
    accuracy: float | None = None
    any_match: float | None = None
    records: list[VQARecord] = dataclasses.field(default_factory=list, repr=False)

    @classmethod
    def of(cls, records: Sequence[VQARecord]) -> "VQAScore":
        """The scores of some questions; `None` for what was not measured of each of them."""
        return cls(len(records), **_means(records), records=list(records))

    # A training run evaluates often and logs none of the intervals: they are computed when they are asked for.
    @cached_property
    def cross_entropy_interval(self) -> tuple[float, float] | None:
        """
        95 % percentile bootstrap of `cross_entropy` over the questions
        ([`~functional.bootstrap.bootstrap_interval`]); `None` if it was not measured or is not finite.
        """
        return self._interval("cross_entropy")

    @cached_property
    def accuracy_interval(self) -> tuple[float, float] | None:
        """The same of `accuracy`."""
        return self._interval("accuracy")

    @cached_property
    def any_match_interval(self) -> tuple[float, float] | None:
        """The same of `any_match`."""
        return self._interval("any_match")

    def _interval(self, measure: str) -> tuple[float, float] | None:
        if getattr(self, measure) is None:
            return None
        values = [getattr(record, measure) for record in self.records]
        return bootstrap_interval(values) if all(map(math.isfinite, values)) else None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON, with the intervals, without the records; what is not known is left out."""
        names = ("count", *MEASURES, *(f"{measure}_interval" for measure in MEASURES))
        return {name: value for name in names if (value := getattr(self, name)) is not None}


MEASURES = ("cross_entropy", "accuracy", "any_match")
"""What is measured of each question."""
_TEXT, _TEXT_OR_NONE = (str,), (str, type(None))
# What a stored question has, and the types.
_STORED: dict[str, tuple[type, ...]] = {
    **{"question": _TEXT, "answer": _TEXT, "digest": _TEXT},
    **dict.fromkeys(("question_type", "name", "question_id", "answer_type", "prediction"), _TEXT_OR_NONE),
    **{"answers": (list, type(None)), "cross_entropy": (float, type(None))},
}
# What follows from a prediction and the ground truth.
_COMPUTED = frozenset({"accuracy", "any_match"})


@dataclasses.dataclass(frozen=True)
class VQAResult(VQAScore):
    """
    Scores over all samples, and of each type of question and of answer.

    Args:
        by_type (`dict[str, VQAScore]`): scores per question type, sorted by name; empty if samples carry no type.
        by_answer_type (`dict[str, VQAScore]`): scores per answer type, likewise.
    """

    by_type: dict[str, VQAScore] = dataclasses.field(default_factory=dict)
    by_answer_type: dict[str, VQAScore] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, records: Sequence[VQARecord]) -> "VQAResult":
        """
        The scores of questions.

        Args:
            records (`Sequence[VQARecord]`): each question and what came of it, at least one.
        """
        return cls(
            len(records),
            **_means(records),
            records=list(records),
            by_type=_grouped(records, lambda annotation: annotation.question_type),
            by_answer_type=_grouped(records, lambda annotation: annotation.answer_type),
        )

    @property
    def predictions(self) -> list[str]:
        """The generated answers in the order asked; empty if none were generated."""
        return [record.prediction for record in self.records if record.prediction is not None]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON, as of [`VQAScore`], with the scores of each type."""
        result = super().to_dict() | {"by_type": {name: score.to_dict() for name, score in self.by_type.items()}}
        if self.by_answer_type:
            result["by_answer_type"] = {name: score.to_dict() for name, score in self.by_answer_type.items()}
        return result


def _means(records: Sequence[VQARecord]) -> dict[str, float]:
    means: dict[str, float] = {}
    for measure in MEASURES:
        values = [value for record in records if (value := getattr(record, measure)) is not None]
        if len(values) == len(records):
            means[measure] = sum(values) / len(values)
    return means


def _grouped(records: Sequence[VQARecord], key: Callable[[VQAAnnotation], str | None]) -> dict[str, VQAScore]:
    groups: dict[str, list[VQARecord]] = {}
    for record in records:
        if (name := key(record.annotation)) is not None:
            groups.setdefault(name, []).append(record)
    return {name: VQAScore.of(group) for name, group in sorted(groups.items())}
