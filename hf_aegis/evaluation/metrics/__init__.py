"""The VQA measures as metrics of the `evaluate` library, which is imported when the first one is loaded."""

from pathlib import Path
from typing import Any


METRICS = ("vqa_accuracy", "vqa_any_match", "answer_cross_entropy")
"""Their names; each is a folder here that `evaluate.load` takes, without a network."""


def load_metric(name: str) -> Any:
    """
    One of the metrics, without files beside it: what is added to it stays in memory.

    Args:
        name (`str`): `"vqa_accuracy"`, `"vqa_any_match"` or `"answer_cross_entropy"`.

    Returns:
        `evaluate.Metric`: with `compute`, `add`, `add_batch`; what it takes is in its `inputs_description`.

    Raises:
        ValueError: if there is no such metric.

    Example:

    ```python
    >>> load_metric("vqa_accuracy").compute(predictions=["red"], references=[["red"] * 2 + ["blue"] * 8])
    {'vqa_accuracy': 0.6}
    ```
    """
    if name not in METRICS:
        raise ValueError(f"There are the metrics {METRICS}; found {name!r}.")
    import evaluate

    return evaluate.load(str(Path(__file__).parent / name / f"{name}.py"), keep_in_memory=True)
