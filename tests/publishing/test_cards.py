"""Cards of policies, from files written by hand."""

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_aegis.publishing import CardOptions, RunRecord, policy_card, write_card
from hf_aegis.publishing.methods import describe_method
from hf_aegis.publishing.papers import PAPERS, bibliography
from hf_aegis.training.aegis_config import AEGISConfig


DEFAULTS = {name: f.default for name, f in AEGISConfig.__dataclass_fields__.items()}


@pytest.fixture
def run_folder(tmp_path):
    """A run of a comparison: seed 0 of `aegis`."""
    folder = tmp_path / "runs" / "aegis" / "seed_0"
    folder.mkdir(parents=True)
    recipe = {"model": None, "anchor": "org/anchor", "vqa_dataset": "easy-vqa", "vqa_split": "test", "max_steps": 7}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "demonstrations": ["/data/me/libero.hdf5"]}))
    config = {"model_type": "paligemma_flow", "vlm_name_or_path": "google/paligemma2-3b-mix-224", "chunk_size": 50}
    (folder / "config.json").write_text(json.dumps({**config, "text_config": {"model_type": "gemma2"}}))
    fingerprints = {
        "vqa_final": "abc",
        "anchor": {"weights_sha256": "f00", "num_samples": 3000, "dataset_id": "vqav2"},
    }
    scores = {"vqa_accuracy": 0.711, "vqa_accuracy_interval": [0.692, 0.7315], "flow_mse": 0.328}
    (folder / "result.json").write_text(json.dumps({**scores, "fingerprints": fingerprints}))
    (folder / "metrics.jsonl").write_text('{"step": 0, "vqa_accuracy": 0.99}\n{"step": 7, "vqa_accuracy": 0.7}\n')
    (tmp_path / "pretrained.json").write_text(json.dumps({"fingerprint": "abc", "accuracy": 0.9965}))
    return folder


def test_every_number_is_the_files_own(run_folder):
    text = policy_card(RunRecord.read(run_folder), "org/policy")
    assert "| VQA accuracy (%) | 99.7 | 71.1 (69.2 – 73.2) |" in text
    assert "| flow MSE on held-out demonstrations | – | 0.3280 |" in text
    card = ModelCard(text)
    assert (card.data.base_model, card.data.license) == ("google/paligemma2-3b-mix-224", "gemma")
    assert card.data.to_dict()["base_model_relation"] == "finetune"
    assert {(e.metric_name, e.metric_value) for e in card.data.eval_results} == {
        ("VQA accuracy", 0.711),
        ("Flow-matching MSE", 0.328),
    }
    assert "[org/anchor](https://huggingface.co/datasets/org/anchor), from 3,000 samples of `vqav2`" in text
    assert "Steps: 7." in text
    assert "libero.hdf5" in text
    assert "/data/me" not in text


def test_a_folder_is_not_linked_as_if_it_were_on_the_hub(run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "anchor").mkdir(parents=True)
    recipe = run_folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("org/anchor", "outputs/anchor"))
    text = policy_card(RunRecord.read(run_folder))
    assert "- Anchor: `anchor`, from 3,000 samples" in text
    assert "huggingface.co/datasets/outputs" not in text


def test_what_transformers_loads_says_so(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma2"}))
    assert ModelCard(policy_card(RunRecord.read(tmp_path), "org/text")).data.library_name == "transformers"


def test_scores_on_other_questions_are_not_those_from_before(run_folder, tmp_path):
    (tmp_path / "pretrained.json").write_text(json.dumps({"fingerprint": "other", "accuracy": 0.9965}))
    assert "| VQA accuracy (%) | – | 71.1" in policy_card(RunRecord.read(run_folder))


def test_a_run_under_way_has_what_was_logged(run_folder):
    (run_folder / "result.json").unlink()
    text = policy_card(RunRecord.read(run_folder))
    assert "| VQA accuracy (%), hold-out during training | 99.0 | 70.0 |" in text
    assert ModelCard(text).data.eval_results is None
    assert text.startswith("---\n")
    assert "# seed_0\n" in text


def test_figures_are_linked_where_they_lie(run_folder):
    (run_folder / "figures").mkdir()
    (run_folder / "figures" / "vqa.png").write_bytes(b"")
    text = write_card(run_folder, "org/policy").read_text()
    links = re.findall(r"!\[([^\]]+)\]\(([^)]+)\)", text)
    assert [path for _, path in links] == ["figures/vqa.png"]
    assert all((run_folder / path).exists() and alternative for alternative, path in links)


def test_options_say_more(run_folder):
    options = CardOptions(license="mit", language="en", tags=["mine"], base_model="org/base", datasets=["org/data"])
    data = ModelCard(policy_card(RunRecord.read(run_folder), "org/policy", options)).data
    assert (data.license, data.language, data.base_model, data.datasets) == ("mit", "en", "org/base", ["org/data"])
    assert "mine" in data.tags


def test_a_model_alone_claims_no_method(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "paligemma_flow"}))
    text = policy_card(RunRecord.read(tmp_path), "org/policy")
    assert "Method" not in text
    assert "AEGIS" not in text
    assert "## Training\n" not in text


def test_a_broken_file_is_named(run_folder):
    (run_folder / "result.json").write_text("{")
    with pytest.raises(ValueError, match=r"result\.json: not JSON"):
        RunRecord.read(run_folder)


@pytest.mark.parametrize(
    ("arguments", "name", "papers"),
    [
        ({}, "AEGIS", ["2604.16067"]),
        ({"preserve": "none"}, "naive fine-tuning", []),
        ({"reference": "replay"}, "A-GEM", ["1812.00420"]),
        ({"reference": "replay", "combiner": "pcgrad", "granularity": "global"}, "PCGrad", ["2001.06782"]),
        ({"reference": "replay", "combiner": "graddrop"}, "GradDrop", ["2010.06808"]),
        ({"preserve": "subspace", "subspace_sensitivity": 0.9}, "held pairs", []),
        ({"preserve": "both"}, "AEGIS + held subspaces", ["2604.16067"]),
        ({"preserve": "none", "penalties": {"ewc": 2.0, "l2sp": 0.1}}, "EWC + L2-SP", ["1612.00796", "1802.01483"]),
        (
            {"preserve": "none", "expert": {"flow_gradient_to_vlm": False}, "fast": {}},
            "stop-gradient + FAST head",
            ["2501.09747"],
        ),
        ({"lora": {"r": 16}}, "AEGIS + LoRA", ["2604.16067", "2106.09685"]),
        ({"preserve": "none", "gse": {"r": 16}}, "VLA-GSE", ["2605.06175"]),
        ({"preserve": "none", "weight_interpolation": 0.5}, "weight interpolation", ["2109.01903"]),
        (
            {"preserve": "none", "keep_within": 0.05, "settling_steps": 9},
            "weight interpolation + settling",
            ["2109.01903"],
        ),
    ],
)
def test_methods_in_words(arguments, name, papers):
    method = describe_method({**DEFAULTS, **arguments})
    assert (method.name, list(method.papers)) == (name, papers)
    assert all(sentence.endswith(".") and not sentence.endswith("..") for sentence in method.sentences)
    assert all(any(f"abs/{paper}" in sentence for sentence in method.sentences) for paper in papers)
    assert all(paper in bibliography(papers) for paper in papers if paper in PAPERS)
