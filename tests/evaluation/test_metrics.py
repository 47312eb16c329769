import subprocess
import sys

import pytest

from hf_aegis.evaluation.metrics import METRICS, load_metric


REFERENCES = [["red"] * 2 + ["blue"] * 8, ["two"] * 5 + ["2"] * 5, ["yes"] * 10]


@pytest.fixture(scope="module")
def metrics():
    """All of them, loaded once: importing `evaluate` takes long."""
    return {name: load_metric(name) for name in METRICS}


@pytest.mark.parametrize(
    ("name", "expected"), [("vqa_accuracy", (0.6 + 1 + 0) / 3), ("vqa_any_match", (1 + 1 + 1) / 3)]
)
def test_answers_are_scored_at_once_or_in_parts(metrics, name, expected):
    predictions = ["red", "2", "Yes"]
    assert metrics[name].compute(predictions=predictions, references=REFERENCES) == {name: pytest.approx(expected)}
    metrics[name].add_batch(predictions=predictions[:2], references=REFERENCES[:2])
    metrics[name].add(prediction="no", reference=REFERENCES[2])
    worse = {"vqa_accuracy": 1.6 / 3, "vqa_any_match": 2 / 3}
    assert metrics[name].compute() == {name: pytest.approx(worse[name])}


def test_cross_entropy_is_the_mean_over_answers(metrics):
    found = metrics["answer_cross_entropy"].compute(predictions=[0.5, 1.5, 4.0])
    assert found == {"answer_cross_entropy": 2.0}


@pytest.mark.parametrize("name", METRICS)
def test_an_unknown_option_is_refused(metrics, name):
    inputs = (
        {"predictions": [0.5]} if name == "answer_cross_entropy" else {"predictions": ["a"], "references": [["a"] * 4]}
    )
    with pytest.raises(TypeError, match="unexpected keyword argument 'normalise'"):
        metrics[name].compute(**inputs, normalise=True)


def test_they_load_by_their_folder(metrics):
    import evaluate

    from hf_aegis.evaluation import metrics as folder

    metric = evaluate.load(f"{folder.__path__[0]}/vqa_any_match", keep_in_memory=True)
    assert metric.compute(predictions=["no"], references=[["no"] * 10]) == {"vqa_any_match": 1.0}


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match=r"'vqa_any_match', .* found 'accuracy'"):
        load_metric("accuracy")


def test_the_room_imports_neither_evaluate_nor_datasets():
    code = "import sys, hf_aegis.evaluation.metrics; print({'evaluate', 'datasets'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
