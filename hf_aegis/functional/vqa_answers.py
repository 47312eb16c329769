"""Comparing generated answers with ground truth: functions of strings."""


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
