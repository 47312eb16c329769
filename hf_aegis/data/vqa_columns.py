"""From a row of a VQA set to an annotation: which columns hold what in the common mirrors of VQA v2 and OK-VQA."""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_aegis.data.vqa_samples import VQAAnnotation
from hf_aegis.functional.vqa_answers import MINIMUM_ANSWERS


CANDIDATES: dict[str, tuple[str, ...]] = {
    "image": ("image",),
    "question": ("question",),
    "answer": ("multiple_choice_answer", "answer"),
    # Sets with both keep all ten annotators in the first.
    "answers": ("answers_original", "answers"),
    "question_type": ("question_type",),
    "answer_type": ("answer_type",),
    "question_id": ("question_id",),
}
"""What is read, and the columns it is looked for in, first come first served."""


@dataclass(frozen=True)
class VQAColumns:
    """
    The columns (or the keys of a JSON line) that hold what [`VQASample`] has; `None` where there is none.

    Args:
        image, question, answer, answers, question_type, answer_type, question_id (`str`, *optional*): column names.
    """

    image: str | None = None
    question: str | None = None
    answer: str | None = None
    answers: str | None = None
    question_type: str | None = None
    answer_type: str | None = None
    question_id: str | None = None

    @classmethod
    def find(cls, available: Sequence[str], chosen: Mapping[str, str | None] | None, source: str) -> "VQAColumns":
        """
        The columns of a set: those chosen, and for the rest the names that mirrors of VQA v2 and OK-VQA use.

        Args:
            available (`Sequence[str]`): the set's columns.
            chosen (`Mapping[str, str]`, *optional*): overrides, e.g. `{"answers": "labels"}`; `None` for no column.
            source (`str`): what the set is called in errors.

        Raises:
            ValueError: if a chosen column or field does not exist, or there is no image, question or answer.
        """
        chosen = dict(chosen or {})
        if unknown := sorted(set(chosen) - set(CANDIDATES)):
            raise ValueError(f"columns: unknown fields {unknown}; the fields are {sorted(CANDIDATES)}.")
        for field, column in chosen.items():
            if column is not None and column not in available:
                raise ValueError(
                    f"{source}: no column {column!r} for {field!r}; found the columns {sorted(available)}."
                )
        found = {
            field: next((name for name in names if name in available), None) for field, names in CANDIDATES.items()
        }
        columns = cls(**{**found, **chosen})
        for field in ("image", "question"):
            if getattr(columns, field) is None:
                raise _missing(source, field, available)
        if columns.answer is None and columns.answers is None:
            raise _missing(source, "answer' or 'answers", available)
        return columns

    @property
    def texts(self) -> list[str]:
        """The columns other than the image's."""
        return sorted({column for field, column in vars(self).items() if column is not None and field != "image"})

    def annotation(self, row: Mapping[str, Any], name: str) -> VQAAnnotation:
        """
        One row's annotation.

        Args:
            row (`Mapping[str, Any]`): a value per column.
            name (`str`): what the row is called in errors.

        Raises:
            ValueError: if a value is missing or of another type, or fewer than four annotators answered.
        """
        answers = self._answers(row, name)
        answer = row.get(self.answer) if self.answer is not None else None
        if answer is None and answers is not None:
            # Ties go to the answer that comes first.
            answer = Counter(answers).most_common(1)[0][0]
        if answer is None:
            raise ValueError(f"{name}: no value in column {self.answer or self.answers!r}; found {sorted(row)}.")
        texts = {"question": row.get(str(self.question)), "answer": answer}
        for field, text in texts.items():
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{name}: column {getattr(self, field)!r} must hold a text; found {text!r}.")
        return VQAAnnotation(
            **texts,
            name=name,
            answers=answers,
            question_type=self._label(row, self.question_type),
            answer_type=self._label(row, self.answer_type),
            question_id=self._label(row, self.question_id),
        )

    def _answers(self, row: Mapping[str, Any], name: str) -> tuple[str, ...] | None:
        values = row.get(self.answers) if self.answers is not None else None
        if values is None:
            return None
        # A list of structures may be stored as a structure of lists.
        values = values.get("answer") if isinstance(values, Mapping) else values
        if isinstance(values, (list, tuple)):
            values = [value.get("answer") if isinstance(value, Mapping) else value for value in values]
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise ValueError(
                f"{name}: column {self.answers!r} must hold a list of texts, or of structures with 'answer'; found "
                f"{row[str(self.answers)]!r}."
            )
        if len(values) < MINIMUM_ANSWERS:
            raise ValueError(
                f"{name}: column {self.answers!r} must hold the answers of at least {MINIMUM_ANSWERS} annotators, "
                f"since with fewer nothing scores one; found {values}. A single ground truth belongs in 'answer'."
            )
        # A big set holds millions of answers, most of them the same few: each is kept once.
        return tuple(map(sys.intern, values))

    @staticmethod
    def _label(row: Mapping[str, Any], column: str | None) -> str | None:
        value = row.get(column) if column is not None else None
        return None if value is None else str(value)


def _missing(source: str, field: str, available: Sequence[str]) -> ValueError:
    return ValueError(
        f"{source}: no column for '{field}'; found the columns {sorted(available)}. Name it with columns={{...}}."
    )
