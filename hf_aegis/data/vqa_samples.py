"""A question about an image, and sets of them whose images are decoded only when asked for."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import overload

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class VQAAnnotation:
    """
    What is known of a question besides its image; the arguments are those of [`VQASample`].
    """

    question: str
    answer: str
    question_type: str | None = None
    name: str | None = None
    answers: tuple[str, ...] | None = None
    question_id: str | None = None
    answer_type: str | None = None


@dataclass(frozen=True)
class VQASample:
    """
    One question about one image, with its ground-truth answer.

    Args:
        image (`PIL.Image.Image`): an RGB image.
        question (`str`): the question, without prompt or image token.
        answer (`str`):
            the ground-truth answer that is taught, and that cross-entropy is taken of: of several annotators' the one
            that the set names, or else the most frequent.
        question_type (`str`, *optional*): what scores are grouped by.
        name (`str`, *optional*): where the sample came from, for error messages.
        answers (`tuple[str, ...]`, *optional*):
            what every annotator answered, ten of them in VQA v2 and OK-VQA; with them, VQA accuracy is measured.
        question_id (`str`, *optional*): the set's own number of the question.
        answer_type (`str`, *optional*): a second grouping of scores, `"yes/no"`, `"number"` or `"other"` in VQA v2.
    """

    image: Image.Image
    question: str
    answer: str
    question_type: str | None = None
    name: str | None = None
    answers: tuple[str, ...] | None = None
    question_id: str | None = None
    answer_type: str | None = None

    @property
    def annotation(self) -> VQAAnnotation:
        """The sample without its image."""
        return VQAAnnotation(*(getattr(self, field.name) for field in fields(VQAAnnotation)))


class VQASamples(Sequence[VQASample]):
    """
    Samples made anew at each access, so that a large set never lies decoded in memory. Slices are again such sets;
    iterate over one once, or make a list of it, rather than index it twice.

    Args:
        rows (`Sequence[int]`): which rows of the source, in which order.
        annotate (`Callable`): gives the annotation of a row.
        open_image (`Callable`): gives the RGB image of a row.
    """

    def __init__(
        self,
        rows: Sequence[int],
        annotate: Callable[[int], VQAAnnotation],
        open_image: Callable[[int], Image.Image],
    ):
        self._rows = rows
        self._annotate = annotate
        self._open_image = open_image

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> VQASample: ...

    @overload
    def __getitem__(self, index: slice) -> "VQASamples": ...

    def __getitem__(self, index: "int | slice") -> "VQASample | VQASamples":
        if isinstance(index, slice):
            return VQASamples(self._rows[index], self._annotate, self._open_image)
        row = self._rows[index]
        annotation = self._annotate(row)
        try:
            image = self._open_image(row)
        # None of these errors says which row it is.
        except (OSError, ValueError) as error:
            raise ValueError(f"{annotation.name}: the image cannot be read: {error}") from error
        return VQASample(image, **{field.name: getattr(annotation, field.name) for field in fields(annotation)})

    def annotations(self) -> Iterator[VQAAnnotation]:
        """The samples without their images, which are not decoded."""
        return map(self._annotate, self._rows)


def annotations(samples: Sequence[VQASample]) -> Iterator[VQAAnnotation]:
    """The annotations of a list of samples or of [`VQASamples`], whose images are not decoded."""
    return samples.annotations() if isinstance(samples, VQASamples) else (sample.annotation for sample in samples)


def choose(count: int, max_samples: int | None, seed: int | None, source: str) -> list[int]:
    """
    Which of `count` questions are taken: in their own order, or shuffled by `seed`, and then the first `max_samples`.

    Raises:
        ValueError: if `max_samples` is not between 1 and `count`; `source` is named.
    """
    if max_samples is not None and not 1 <= max_samples <= count:
        raise ValueError(f"max_samples must lie between 1 and the {count} questions of {source}; found {max_samples}.")
    order = np.arange(count) if seed is None else np.random.default_rng(seed).permutation(count)
    return order[:max_samples].tolist()
