"""`hf-aegis push` of results and of what is no result."""

import json
import re

import pytest
import torch
from datasets import load_dataset
from huggingface_hub import DatasetCard
from transformers import LlamaConfig, LlamaForCausalLM

from hf_aegis.anchors import ActivationAnchor
from hf_aegis.cli import main
from hf_aegis.cli.push import recognise


REPO = "org/results"


@pytest.fixture
def comparison(tmp_path):
    """Two conditions with two seeds each, measured, and their report with a figure."""
    folder = tmp_path / "comparison"
    conditions = {"naive": {"preserve": "none"}, "aegis": {"anchor": f"{folder}/anchors/easy"}}
    settings = {"conditions": conditions, "seeds": [0, 1], "command": f"hf-aegis compare --output_dir {folder}"}
    settings["machine"] = {"jobs": 1, "cores": 2}
    for condition, accuracy in (("naive", 0.6), ("aegis", 0.7)):
        for seed in (0, 1):
            run = folder / "runs" / condition / f"seed_{seed}"
            run.mkdir(parents=True)
            result = {"vqa_accuracy": accuracy + seed / 10, "vqa_cross_entropy": 1.0, "flow_mse": 0.3}
            (run / "result.json").write_text(json.dumps(result))
            (run / "model.safetensors").write_bytes(b"weights")
    (folder / "compare.json").write_text(json.dumps(settings))
    (folder / "figures").mkdir()
    (folder / "figures" / "vqa.png").write_bytes(b"\x89PNG")
    (folder / "report.html").write_text("<html></html>")
    return folder


def test_results_are_a_data_set(hub, comparison, capsys, tmp_path):
    assert main(["push", str(comparison), REPO, "--private", "--commit_message", "Two seeds"]) == 0
    assert f"comparison: {hub.url}/datasets/{REPO}/commit/" in capsys.readouterr().out
    repository = hub.repo(REPO, "dataset")
    assert repository.private
    assert repository.history()[0].title == "Two seeds"
    names = {"README.md", "results.csv", "results.json", "results.md", "report.html", "figures/vqa.png"}
    assert repository.files().keys() - {".gitattributes"} == names
    assert not [name for name, content in repository.files().items() if str(tmp_path).encode() in content]

    runs = load_dataset(REPO, split="runs")
    assert sorted(zip(runs["condition"], runs["seed"], strict=True)) == [
        ("aegis", 0),
        ("aegis", 1),
        ("naive", 0),
        ("naive", 1),
    ]
    assert dict(zip(zip(runs["condition"], runs["seed"], strict=True), runs["vqa_accuracy"], strict=True))[
        "aegis", 1
    ] == pytest.approx(0.8)
    card = DatasetCard(repository.files()["README.md"].decode())
    card.validate()
    assert "| aegis | 2 |" in card.text
    assert re.findall(r"!\[[^\]]+\]\(([^)]+)\)", card.text) == ["figures/vqa.png"]
    assert f'load_dataset("{REPO}", split="runs")' in card.text


def test_a_card_of_one_s_own_is_kept(hub, comparison):
    card = "---\nlicense: mit\n---\n# Mine\n"
    (comparison / "README.md").write_text(card)
    main(["push", str(comparison), REPO, "--keep_card"])
    assert hub.repo(REPO, "dataset").files()["README.md"] == card.encode()


@pytest.mark.parametrize("token", ["bad", "read only"])
def test_a_push_that_is_refused_is_one_line_without_the_token(hub, comparison, monkeypatch, capsys, token):
    value = {"bad": hub.bad_token, "read only": hub.read_only_token}[token]
    monkeypatch.setenv("HF_TOKEN", value)
    assert main(["push", str(comparison), REPO]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hf-aegis push: error: ")
    assert error.count("\n") == 1
    assert REPO in error
    assert value not in error


def test_what_a_folder_holds(tmp_path):
    for name, kind in (
        ("config.json", "model"),
        ("adapter_config.json", "adapter"),
        ("compare.json", "comparison"),
        ("anchor_config.json", "anchor"),
    ):
        (tmp_path / name).write_text("{}")
        assert recognise(tmp_path) == kind
    with pytest.raises(ValueError, match="is no folder"):
        recognise(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds nothing to push: expected one of anchor_config.json \(anchor\)"):
        recognise(tmp_path / "empty")


def test_an_anchor_is_pushed_as_by_its_own_method(hub, tmp_path, capsys):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes))
    tokens = torch.arange(12).reshape(2, 6)
    anchor = ActivationAnchor.collect(model, [{"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}])
    anchor.save_pretrained(tmp_path / "anchor")
    assert main(["push", str(tmp_path / "anchor"), "org/anchor"]) == 0
    assert f"anchor: {hub.url}/datasets/org/anchor/commit/" in capsys.readouterr().out
    loaded = ActivationAnchor.from_pretrained("org/anchor")
    assert torch.equal(loaded.mean, anchor.mean)
    assert "README.md" in hub.repo("org/anchor", "dataset").files()


def test_a_checkpoint_s_folder_is_pushed_without_pickles(hub, tmp_path):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    model.save_pretrained(tmp_path / "checkpoint-5")
    for name in ("optimizer.pt", "rng_state.pth", "training_args.bin", "trainer_state.json", "inner/weights.pkl"):
        (tmp_path / "checkpoint-5" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "checkpoint-5" / name).write_bytes(b"not to be read")
    assert main(["push", str(tmp_path / "checkpoint-5"), REPO]) == 0
    weights = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert hub.repo(REPO).files().keys() == weights


def test_weights_take_the_place_of_shards(hub, tmp_path):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    for name, size in (("shards", "10KB"), ("whole", "1GB")):
        model.save_pretrained(tmp_path / name, max_shard_size=size)
        main(["push", str(tmp_path / name), REPO])
        stored = {file for file in hub.repo(REPO).files() if "safetensors" in file}
        assert stored == {path.name for path in (tmp_path / name).glob("*safetensors*")}


def test_what_was_to_be_proposed_is_not_to_be_pushed_the_next_time(hub, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    hub.fail_next("POST", "/commit/")
    assert main(["push", str(tmp_path), REPO, "--create_pr"]) == 2
    assert f"`hf-aegis push {tmp_path} {REPO} --create_pr` does the same" in capsys.readouterr().err
