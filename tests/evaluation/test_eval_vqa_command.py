import argparse
import json

import pytest

from hf_aegis.cli import eval_vqa
from hf_aegis.cli.device import resolve_device


def run(*options):
    parser = argparse.ArgumentParser()
    eval_vqa.configure(parser)
    return eval_vqa.run(parser.parse_args([str(option) for option in options]))


def test_the_embedded_model_is_scored_by_question_type(tmp_path, capsys):
    output = tmp_path / "scores.json"
    run("--max_samples", 60, "--batch_size", 16, "--output", output)
    scores = json.loads(output.read_text())
    printed = capsys.readouterr().out
    assert printed.endswith(output.read_text())
    assert scores["count"] == sum(row["count"] for row in scores["by_type"].values()) == 60
    right = sum(row["count"] * row["accuracy"] for row in scores["by_type"].values())
    assert scores["accuracy"] == pytest.approx(right / 60)
    assert f"{100 * scores['accuracy']:.2f} %" in printed
    assert list(tmp_path.iterdir()) == [output]


def test_a_model_with_an_action_expert_can_be_scored(tmp_path, tiny_model, tiny_processor):
    from hf_aegis.models import PaliGemmaFlowForAction

    expert = {"expert_hidden_size": 32, "expert_num_layers": 1, "expert_num_heads": 4, "expert_intermediate_size": 32}
    PaliGemmaFlowForAction.from_vlm(tiny_model, **expert).save_pretrained(tmp_path)
    tiny_processor.save_pretrained(tmp_path)
    options = ("--device", "cpu", "--attn_implementation", "eager", "--revision", "main")
    run("--model", tmp_path, "--max_samples", 4, "--output", tmp_path / "scores.json", *options)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert {name: scores[name] for name in ("model", "revision", "attn_implementation", "device")} == {
        "model": str(tmp_path),
        "revision": "main",
        "attn_implementation": "eager",
        "device": "cpu",
    }
    # Gemma 2 soft-caps its attention scores, so the option must have reached the model.
    with pytest.raises(ValueError, match="soft-caps its attention scores"):
        run("--model", tmp_path, "--max_samples", 4, "--attn_implementation", "sdpa")


@pytest.mark.parametrize(("available", "expected"), [(True, "cuda"), (False, "cpu")])
def test_the_device_is_the_gpu_where_there_is_one(monkeypatch, available, expected):
    monkeypatch.setattr("torch.cuda.is_available", lambda: available)
    assert resolve_device("auto") == expected
    assert resolve_device("cpu") == "cpu"
    if available:
        assert resolve_device("cuda:1") == "cuda:1"
    else:
        with pytest.raises(ValueError, match=r"device 'cuda': torch .* finds no GPU"):
            run("--device", "cuda", "--max_samples", 4)


def test_wrong_options_are_refused_before_a_model_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="--batch_size must be at least 1; found 0"):
        run("--batch_size", 0, "--model", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="max_samples must lie between 1 and the 9673 questions"):
        run("--max_samples", 0, "--model", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="missing does not exist"):
        run("--output", tmp_path / "missing" / "scores.json", "--model", tmp_path / "nowhere")
