"""Whether any annotator gave the answer, as a metric of the `evaluate` library."""

import datasets
import evaluate

from hf_aegis.functional.vqa_answers import any_match


class VQAAnyMatch(evaluate.Metric):
    """Share of questions with [`~functional.vqa_answers.any_match`], between 0 and 1."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Share of answers that any annotator gave, after the normalisation of VQA accuracy.",
            citation="arXiv 2604.16067, evaluation on OK-VQA",
            inputs_description="predictions: list of texts; references: for each, the texts of its ten annotators.",
            features=datasets.Features({"predictions": text, "references": datasets.List(text)}),
        )

    def _compute(self, *, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        values = [any_match(*pair) for pair in zip(predictions, references, strict=True)]
        return {"vqa_any_match": sum(values) / len(values)}
