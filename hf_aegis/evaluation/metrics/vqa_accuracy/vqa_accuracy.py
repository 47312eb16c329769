"""The published VQA accuracy as a metric of the `evaluate` library."""

import datasets
import evaluate

from hf_aegis.functional.vqa_answers import vqa_accuracy


class VQAAccuracy(evaluate.Metric):
    """Mean of [`~functional.vqa_answers.vqa_accuracy`] over questions, between 0 and 1 and not rounded."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Agreement of annotators with each answer as github.com/GT-Vision-Lab/VQA computes it.",
            citation="Antol et al., VQA: Visual Question Answering, arXiv 1505.00468",
            inputs_description="predictions: list of texts; references: for each, the texts of its ten annotators.",
            features=datasets.Features({"predictions": text, "references": datasets.List(text)}),
        )

    def _compute(self, *, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        values = [vqa_accuracy(*pair) for pair in zip(predictions, references, strict=True)]
        return {"vqa_accuracy": sum(values) / len(values)}
