import argparse
import json

import pytest

from hf_aegis.cli import eval_vqa


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
    run("--model", tmp_path, "--max_samples", 4, "--output", tmp_path / "scores.json")
    assert json.loads((tmp_path / "scores.json").read_text())["model"] == str(tmp_path)


def test_wrong_options_are_refused_before_a_model_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="--batch_size must be at least 1; found 0"):
        run("--batch_size", 0, "--model", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="max_samples must lie between 1 and the 9673 questions"):
        run("--max_samples", 0, "--model", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="missing does not exist"):
        run("--output", tmp_path / "missing" / "scores.json", "--model", tmp_path / "nowhere")
