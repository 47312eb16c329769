"""Cross-entropy of ground-truth answers as a metric of the `evaluate` library."""

import datasets
import evaluate


class AnswerCrossEntropy(evaluate.Metric):
    """
    Mean over answers, in nats per token. Each answer comes with its own mean over tokens
    ([`~evaluation.VQARecord.cross_entropy`]), so that long answers weigh no more than short ones.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Mean teacher-forced cross-entropy of ground-truth answers in nats per token.",
            citation="arXiv 2604.16067, evaluation",
            inputs_description="predictions: for each answer, the mean negative log-likelihood of its tokens in nats.",
            features=datasets.Features({"predictions": datasets.Value("float64")}),
        )

    def _compute(self, *, predictions: list[float]) -> dict[str, float]:
        return {"answer_cross_entropy": sum(predictions) / len(predictions)}
