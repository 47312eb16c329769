"""Comparing generated answers with ground truth: functions of strings.

The accuracy is that of the published evaluator, github.com/GT-Vision-Lab/VQA at a013f00, `vqaEval.py` (Antol et al.,
arXiv 1505.00468), quirks included: scores of other papers contain them.
"""

import re
from collections.abc import Sequence

from hf_aegis.functional.vqa_contractions import CONTRACTIONS


NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
NUMBERS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
ARTICLES = frozenset({"a", "an", "the"})
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

MINIMUM_ANSWERS = 4
"""With fewer annotators a prediction that all of them gave would score below one."""

# The published pattern begins with `(?!<=\d)`, a misspelt look-behind that always holds.
_PERIOD = re.compile(r"\.(?!\d)")
# `re.UNICODE` is passed there where the number of replacements belongs.
_PERIODS_REMOVED = int(re.UNICODE)
_COMMA_IN_NUMBER = re.compile(r"\d,\d")


def normalize_vqa_answer(answer: str) -> str:
    """
    An answer as the published VQA evaluator compares it.

    In this order: line breaks and tabs become spaces and the ends are stripped; each punctuation mark is removed where
    it stands beside a space anywhere in the text, and everywhere if the text has a comma between digits, and is
    replaced by a space otherwise; the first 32 periods that no digit follows are removed; the text is lower-cased,
    number words up to ten become digits (`"none"` is 0), articles are dropped, and contractions get their apostrophes.

    Args:
        answer (`str`): what a model or a person answered.

    Returns:
        `str`: words separated by single spaces; empty if nothing is left, as of `"the"`.

    Example:

    ```python
    >>> normalize_vqa_answer("The two dogs, isnt it?")
    "2 dogs isn't it"
    ```
    """
    original = text = _strip(answer)
    number_with_comma = _COMMA_IN_NUMBER.search(original) is not None
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in original or f" {mark}" in original
        text = text.replace(mark, "" if beside_space or number_with_comma else " ")
    text = _PERIOD.sub("", text, count=_PERIODS_REMOVED)
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """
    The published VQA accuracy of one prediction: with each annotator left out in turn, a third for each of the others
    who gave it, at most one; the mean of these.

    Where all annotators agree to the letter, nothing is normalised ([`normalize_vqa_answer`]), the prediction neither:
    `"Yes"` then differs from `"yes"`. The published evaluator rounds percentages to two decimals; this does not.

    Args:
        prediction (`str`): the generated answer.
        answers (`Sequence[str]`): what the annotators answered, ten of them in VQA and in OK-VQA.

    Returns:
        `float`: between 0 and 1.

    Raises:
        ValueError: if there are fewer than four answers, with which nothing could score one.
    """
    truths = [_strip(answer) for answer in _checked(answers)]
    prediction = _strip(prediction)
    if len(set(truths)) > 1:
        truths = [normalize_vqa_answer(truth) for truth in truths]
        prediction = normalize_vqa_answer(prediction)
    count, matches = len(truths), truths.count(prediction)
    left_out_matching, left_out_other = min(1.0, (matches - 1) / 3), min(1.0, matches / 3)
    return (matches * left_out_matching + (count - matches) * left_out_other) / count


def any_match(prediction: str, answers: Sequence[str]) -> bool:
    """
    Whether a prediction equals any annotator's answer after [`normalize_vqa_answer`]; true wherever [`vqa_accuracy`]
    is above zero.

    Args:
        prediction (`str`): the generated answer.
        answers (`Sequence[str]`): what the annotators answered.

    Raises:
        ValueError: if there are fewer than four answers.
    """
    prediction = normalize_vqa_answer(prediction)
    return any(normalize_vqa_answer(answer) == prediction for answer in _checked(answers))


def normalize_answer(answer: str) -> str:
    """Lower case, runs of white space as one blank, none at the ends: `" Yes\\n"` becomes `"yes"`."""
    return " ".join(answer.lower().split())


def exact_match(prediction: str, answer: str) -> bool:
    """
    Whether two answers are equal after [`normalize_answer`].

    Args:
        prediction (`str`): the generated answer.
        answer (`str`): the ground-truth answer.

    Raises:
        ValueError: if the ground truth is blank, since an empty prediction would match it.
    """
    normalized = normalize_answer(answer)
    if not normalized:
        raise ValueError(f"The ground-truth answer must not be blank; found {answer!r}.")
    return normalize_answer(prediction) == normalized


def _strip(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _checked(answers: Sequence[str]) -> Sequence[str]:
    if isinstance(answers, str) or len(answers) < MINIMUM_ANSWERS:
        raise ValueError(
            f"VQA accuracy needs the answers of at least {MINIMUM_ANSWERS} annotators (ten in VQA); found {answers!r}."
        )
    return answers
