"""Whole runs on the Hub: model, adapter, results and card."""

import json
import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel

from hf_aegis.assets import EMBEDDED_VLM
from hf_aegis.cli import main
from hf_aegis.hub import HubUploadError
from hf_aegis.models import PaliGemmaFlowForAction, PaliGemmaFlowProcessor
from hf_aegis.training import AEGISTrainer
from hf_aegis.training.run import RunArguments, run_training


REPO = "org/policy"
EXPERT = {"expert_hidden_size": 16, "expert_num_layers": 1, "expert_num_heads": 2, "expert_intermediate_size": 32}
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def run(demonstrations, flow_anchor, tmp_path):
    return RunArguments(
        demonstrations=[demonstrations],
        anchor=str(flow_anchor.save_pretrained(tmp_path / "anchor")),
        chunk_size=4,
        expert=EXPERT,
        lora={"r": 2},
        vqa_samples=4,
        vqa_final_samples=5,
        action_samples=2,
    )


@pytest.fixture
def pushing(make_args):
    options = {"push_to_hub": True, "hub_model_id": REPO, "hub_strategy": "end", "hub_private_repo": True}
    return make_args(max_steps=2, vqa_accuracy=False, **options)


def test_a_run_is_pushed_when_it_has_ended(hub, run, pushing, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    hub.fail_next("POST", "/commit/")
    with pytest.raises(HubUploadError, match=f"`hf-aegis push {out} {REPO} --private` does the same"):
        run_training(run, pushing)
    # All of it is there, and nothing trains again.
    assert (out / "result.json").exists()
    monkeypatch.setattr(AEGISTrainer, "train", None)
    result = run_training(run, pushing, illustrate=lambda folder: (folder / "figures").mkdir())
    files = hub.repo(REPO).files()
    assert hub.repo(REPO).private
    assert json.loads(files["result.json"]) == {"format_version": 1, **result}
    expected = {"README.md", "config.json", "model.safetensors", "processor_config.json", "recipe.yaml"}
    assert expected | {"adapter/adapter_model.safetensors", "adapter/README.md", "metrics.jsonl"} <= files.keys()
    assert not [name for name in files if re.search(r"checkpoint|\.bin$|\.pt$|\.pth$|^\.|/\.", name)]
    for name, content in files.items():
        assert str(tmp_path).encode() not in content, name
        assert str(EMBEDDED_VLM.parent).encode() not in content, name
        assert hub.token.encode() not in content, name
    assert yaml.safe_load(files["recipe.yaml"])["anchor"] == "anchor"

    loaded = PaliGemmaFlowForAction.from_pretrained(REPO)
    local = PaliGemmaFlowForAction.from_pretrained(out)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), local.parameters(), strict=True))
    assert PaliGemmaFlowProcessor.from_pretrained(REPO).statistics is not None
    base = PaliGemmaFlowForAction.from_vlm(EMBEDDED_VLM, dtype="float32", chunk_size=4, **EXPERT)
    merged = PeftModel.from_pretrained(base, REPO, subfolder="adapter").merge_and_unload()
    own, other = merged.state_dict(), local.state_dict()
    assert {name for name in own if not torch.equal(own[name], other[name])} == set()

    # The command pushes the same; nothing but the figures is new.
    before = hub.repo(REPO).files()
    assert main(["push", str(out), REPO, "--private"]) == 0
    assert f"model: {hub.url}/{REPO}/commit/" in capsys.readouterr().out
    after = hub.repo(REPO).files()
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"README.md", "figures/vqa.png", "figures/flow.png", "figures/projection.png"}


def test_the_card_tells_what_the_files_tell(hub, run, pushing, flow_anchor, tmp_path):
    result = run_training(run, pushing)
    text = hub.repo(REPO).files()["README.md"].decode()
    card = ModelCard(text)
    card.validate()
    assert (card.data.library_name, card.data.pipeline_tag, card.data.license) == (
        "hf_aegis",
        "robotics",
        "apache-2.0",
    )
    assert {"aegis", "lora", "robotics"} <= set(card.data.tags)
    scores = {found.metric_name: found.metric_value for found in card.data.eval_results}
    assert scores == {
        "VQA accuracy": result["vqa_accuracy"],
        "VQA cross-entropy, nats per token": result["vqa_cross_entropy"],
        "Flow-matching MSE": result["flow_mse"],
        "Open-loop action MSE": result["action_mse"],
    }
    assert flow_anchor.fingerprint.weights_sha256 in text
    assert f"| VQA accuracy (%) | – | {100 * result['vqa_accuracy']:.1f} (" in text
    assert f'PaliGemmaFlowForAction.from_pretrained("{REPO}")' in text
    assert all(f"arxiv.org/abs/{paper}" in text for paper in ("2604.16067", "2106.09685"))
    assert not re.search(r"\{\{|\{%|<!--|None", card.text)
    adapter = ModelCard(hub.repo(REPO).files()["adapter/README.md"].decode())
    assert adapter.data.library_name == "peft"
    assert f'PeftModel.from_pretrained(base, "{REPO}", subfolder="adapter")' in adapter.text
    assert 'from_vlm(EMBEDDED_VLM, dtype="float32", chunk_size=4, expert_hidden_size=16' in adapter.text


def test_a_recipe_is_no_place_for_a_token(tmp_path, capsys):
    assert main(["train", "--output_dir", str(tmp_path / "out"), "--hub_token", "hf_" + "x" * 34]) == 2
    error = capsys.readouterr().err
    assert "hub_token: a command line or a recipe is no place for a token" in error
    assert "xxxx" not in error
