import json
import re

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import hf_aegis.models  # noqa: F401 (registers the models with an action expert)
from hf_aegis.assets import DEMO_CHECKPOINTS
from hf_aegis.data.vqa import load_easy_vqa
from hf_aegis.evaluation import VQAHoldout


@pytest.fixture(scope="module", params=list(DEMO_CHECKPOINTS))
def shipped(request):
    """A shipped policy: its folder, model and processor."""
    folder = DEMO_CHECKPOINTS[request.param]
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return folder, model, AutoProcessor.from_pretrained(folder)


def scores(folder):
    return json.loads((folder / "evaluation.json").read_text())


def test_it_loads_whole_and_is_stored_in_bfloat16(shipped):
    folder, model, processor = shipped
    loaded, report = type(model).from_pretrained(folder, output_loading_info=True)
    assert loaded.dtype == torch.bfloat16
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert processor.statistics.actions.dimension == model.config.action_dim == 7


def test_it_answers_as_its_figures_say(shipped):
    folder, model, processor = shipped
    measured = VQAHoldout(load_easy_vqa("test", 200, seed=0), processor).evaluate_accuracy(model).accuracy
    # The first 200 of the 2,000 questions: three standard errors at most.
    assert measured == pytest.approx(scores(folder)["vqa"]["accuracy"], abs=0.1)


def test_rounding_cost_little(shipped):
    folder, _, _ = shipped
    after, exact = scores(folder)["vqa"], scores(folder)["in_float32"]
    assert after["count"] == 2000
    assert after["accuracy"] == pytest.approx(exact["vqa_accuracy"], abs=0.005)
    assert after["cross_entropy"] == pytest.approx(exact["vqa_cross_entropy"], rel=0.02)


def test_what_was_kept_is_in_the_order_that_the_page_shows():
    accuracy = {name: scores(folder)["vqa"]["accuracy"] for name, folder in DEMO_CHECKPOINTS.items()}
    assert accuracy["naive"] < accuracy["aegis"] < accuracy["held_pairs"]


@pytest.mark.parametrize("folder", DEMO_CHECKPOINTS.values(), ids=DEMO_CHECKPOINTS)
def test_it_is_small_and_names_no_machine(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 4.6e6
    for path in files:
        if path.suffix != ".safetensors" and path.name != "tokenizer.json":
            # A path from a root: an address has a colon before its slashes, and a type of question a letter.
            assert not re.search(r"""(?:^|[\s"'=(])/\w+/\w""", path.read_text()), path


@pytest.mark.parametrize("folder", DEMO_CHECKPOINTS.values(), ids=DEMO_CHECKPOINTS)
def test_the_card_quotes_the_evaluation(folder):
    card, values = (folder / "README.md").read_text(), scores(folder)
    assert f"{values['vqa']['accuracy']:.1%} | {values['vqa_before']['cross_entropy']:.4f}" in card
    assert f"{values['flow_mse']:.4f}" in card
    assert not re.search(r"\{\w*\}", card)


def test_the_curves_are_those_that_are_drawn():
    for folder in DEMO_CHECKPOINTS.values():
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records if "vqa_accuracy" in record] == list(range(0, 301, 50))
        assert {key for record in records for key in record} == {
            "step",
            "vqa_cross_entropy",
            "vqa_accuracy",
            "eval_flow_mse",
        }
