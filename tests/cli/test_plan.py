"""`hf-aegis plan`: recipes of a training and of a comparison, without weights and without a network."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from hf_aegis.assets import EMBEDDED_VLM
from hf_aegis.cli import main


RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def comparison(tmp_path) -> Path:
    recipe = tmp_path / "compare.yaml"
    recipe.write_text(
        f"""
output_dir: {tmp_path / "out"}
shared:
  expert: {{expert_hidden_size: 32, expert_num_layers: 1, expert_num_heads: 2, expert_intermediate_size: 64}}
  chunk_size: 4
  vqa_samples: 0
anchors:
  easy_vqa: {{dataset: easy-vqa, split: train, num_samples: 30}}
conditions:
  naive: {{preserve: none}}
  aegis: {{preserve: projection, anchor: easy_vqa}}
  lora: {{preserve: none, lora: {{r: 4}}}}
  distilled: {{preserve: none, penalties: {{distillation: 1.0}}}}
""",
        encoding="utf-8",
    )
    return recipe


@pytest.fixture
def small(tmp_path) -> Path:
    """The embedded model with one layer of each kind: going through a step takes time by the layer."""
    config = AutoConfig.from_pretrained(EMBEDDED_VLM)
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 1
    config.text_config.layer_types = config.text_config.layer_types[:1]
    config.save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def plan(capsys, *options) -> str:
    assert main(["plan", "--device", "cpu", *map(str, options)]) == 0
    return capsys.readouterr().out


def test_a_training_is_itemised(capsys, small):
    override = '{"vqa_samples": 0, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}'
    options = ("--model_config", small, "--override", override, "--capacities", "0.5", "24")
    text = plan(capsys, "--config", RECIPES / "embedded_aegis.yaml", *options)

    assert "embedded_aegis: the embedded model, batch 2, 152 tokens, float32 weights, adamw_torch_fused" in text
    for item in ("parameters", "optimiser state", "activations", "expert average", "operations of a step:"):
        assert item in text
    assert "0.5 GiB: does not fit" in text
    assert "24 GiB: fits; largest batch per device" in text
    assert "note: 2 cameras and 24 tokens of text are assumed for a sample" in text
    assert "what lowers the peak" not in text


def test_what_a_plan_is_not_of_is_noted(capsys, comparison, small):
    override = '{"fsdp": true, "reference_interval": 4}'
    text = plan(capsys, "--config", comparison, "--only", "aegis", "--model_config", small, "--override", override)
    assert "note: the recipe asks for FSDP, and this is what one device would take alone, with nothing sharded" in text
    assert "note: operations are a mean: one backward pass in 4 computes a reference" in text


@pytest.mark.slow
def test_advice_is_given_where_it_is_asked_for(capsys, small):
    override = '{"vqa_samples": 0, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}'
    config = RECIPES / "embedded_aegis.yaml"
    text = plan(capsys, "--config", config, "--model_config", small, "--override", override, "--advice")

    assert "what lowers the peak, each by itself:" in text
    assert "per_device_train_batch_size: 1, gradient_accumulation_steps: 2: " in text


def test_a_comparison_has_a_row_for_each_condition(capsys, comparison, small, tmp_path):
    text = plan(capsys, "--config", comparison, "--model_config", small, "--json", tmp_path / "plan.json")
    figures = json.loads((tmp_path / "plan.json").read_text())
    by_name = {found["name"]: found for found in figures["plans"]}

    assert [line.split()[0] for line in text.splitlines()[1:5]] == [*("naive", "aegis", "lora", "distilled")]
    phases = ["load", "forward", "backward", "optimizer", "evaluation"]
    assert text.split()[: 3 + len(phases)] == ["condition", "peak", *phases, "operations"]
    assert "what is kept beside the model" in by_name["distilled"]["items"]
    assert text.count("note: 2 cameras and 24 tokens of text are assumed for a sample") == 1
    assert figures["device"] == "cpu"
    # One backward pass more through the decoder, and fewer weights to train.
    assert by_name["aegis"]["step_flops"] > 1.2 * by_name["naive"]["step_flops"]
    assert by_name["lora"]["items"]["optimiser state"] < by_name["naive"]["items"]["optimiser state"]
    assert by_name["lora"]["trainable_parameters"] < by_name["naive"]["trainable_parameters"]
    assert not any("largest_batch" in found for found in figures["plans"])
    for found in by_name.values():
        assert sum(found["items"].values()) == found["peak_bytes"] == max(found["phases"].values())
        assert found["fits"] == {"24": True, "48": True, "80": True}


def test_what_is_wrong_is_said(capsys, comparison, tmp_path):
    assert main(["plan", "--config", str(comparison), "--only", "nobody"]) == 2
    assert "--only: unknown conditions ['nobody']" in capsys.readouterr().err
    assert main(["plan", "--config", str(comparison), "--override", '{"nothing": 1}']) == 2
    assert "nothing" in capsys.readouterr().err
    assert main(["plan", "--config", str(comparison), "--model_config", str(tmp_path / "absent.json")]) == 2
    assert "model_config:" in capsys.readouterr().err


@pytest.mark.slow
def test_the_papers_setting_is_planned_without_its_weights_or_a_network(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["plan", "--config", str(RECIPES / "paligemma2_3b" / "naive.yaml"), "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)["plans"][0]
    weights = 4 * found["parameters"]

    assert 3.2e9 < found["parameters"] < 3.3e9
    assert found["items"]["parameters"] == pytest.approx(weights, rel=0.01)
    assert not found["fits"]["24"] and found["fits"]["80"]
