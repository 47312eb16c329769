import argparse
import json
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
from PIL import Image

from hf_aegis.cli import eval_vqa
from hf_aegis.cli.device import resolve_device
from hf_aegis.data.vqa import load_easy_vqa
from hf_aegis.evaluation import VQAHoldout


pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def run(*options):
    parser = argparse.ArgumentParser()
    eval_vqa.configure(parser)
    return eval_vqa.run(parser.parse_args([str(option) for option in options]))


@pytest.fixture
def tiny(tmp_path, tiny_model, tiny_processor):
    """A folder with the tiny model."""
    folder = tmp_path / "model"
    tiny_model.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    """Ten of easy-VQA's questions as a folder, half of them with ten annotators."""
    path = tmp_path / "set"
    path.mkdir()
    lines = []
    for index, sample in enumerate(load_easy_vqa("test", 10, seed=1)):
        sample.image.save(path / f"{index}.png")
        line = {"image": f"{index}.png", "question": sample.question, "answer_type": "other", "question_id": index}
        lines.append(line | {"answers": [sample.answer] * 7 + ["red", "blue", "a red"], "question_type": "what"})
    (path / "val.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


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
    low, high = scores["accuracy_interval"]
    assert low <= scores["accuracy"] <= high
    assert "any_match" not in scores
    assert set(tmp_path.iterdir()) == {output, tmp_path / "scores.json.predictions.jsonl"}


def test_scores_and_fingerprint_are_those_of_the_holdout(tmp_path, tiny, tiny_model, tiny_processor):
    run("--model", tiny, "--max_samples", 12, "--seed", 3, "--batch_size", 5, "--output", tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    holdout = VQAHoldout(load_easy_vqa("test", 12, seed=3), tiny_processor)
    expected = holdout.evaluate(tiny_model)
    assert scores["fingerprint"] == holdout.fingerprint
    assert scores["accuracy"] == expected.accuracy
    assert scores["cross_entropy"] == pytest.approx(expected.cross_entropy, abs=1e-5)
    assert scores["by_type"].keys() == expected.by_type.keys()
    lines = (tmp_path / "scores.json.predictions.jsonl").read_text().split("\n")[:-1]
    assert [json.loads(line)["prediction"] for line in lines[1:]] == expected.predictions


def test_a_killed_run_continues_and_a_finished_one_is_not_repeated(tmp_path, tiny, folder, monkeypatch, capsys):
    output, predictions = tmp_path / "scores.json", tmp_path / "scores.json.predictions.jsonl"
    options = ("--model", tiny, "--dataset", folder, "--batch_size", 3, "--output", output)
    run(*options)
    whole, answered = output.read_bytes(), predictions.read_bytes()
    assert json.loads(whole)["by_answer_type"]["other"]["count"] == json.loads(whole)["by_type"]["what"]["count"] == 10
    assert "any_match_interval" in json.loads(whole)
    asked, original = [], VQAHoldout.ask

    def ask(self, *args, **kwargs):
        asked.append(len(self))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(VQAHoldout, "ask", ask)
    ends = [index for index, byte in enumerate(answered) if byte == ord("\n")]
    # After nothing, in the first line, after it, inside a batch, inside a line of a batch, after a batch.
    for cut, batches in (
        (0, [3, 3, 3, 1]),
        (20, [3, 3, 3, 1]),
        (ends[0] + 1, [3, 3, 3, 1]),
        (ends[5] + 1, [3, 3, 1]),
        (ends[5] + 40, [3, 3, 1]),
        (ends[9] + 1, [1]),
    ):
        output.unlink()
        predictions.write_bytes(answered[:cut])
        asked.clear()
        run(*options)
        assert asked == batches
        assert (output.read_bytes(), predictions.read_bytes()) == (whole, answered)
    monkeypatch.setattr(eval_vqa, "_load_model", lambda *_: pytest.fail("the model was loaded"))
    run(*options)
    assert output.read_bytes() == whole


def test_another_run_does_not_continue(tmp_path, tiny, folder):
    output, predictions = tmp_path / "scores.json", tmp_path / "scores.json.predictions.jsonl"
    options = ("--model", tiny, "--dataset", folder, "--output", output)
    run(*options, "--max_samples", 4)
    scores = output.read_bytes()
    with pytest.raises(
        ValueError, match=r"predictions.jsonl was begun .*: batch_size is 64 there and 2 here; dtype is"
    ):
        run(*options, "--max_samples", 4, "--dtype", "bfloat16", "--batch_size", 2)
    (tiny / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes() + b" ")
    with pytest.raises(ValueError, match=r"other settings: weights_sha256 is '\w+' there"):
        run(*options, "--max_samples", 4)
    (tiny / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:-1])
    lines = (folder / "val.jsonl").read_text().splitlines(keepends=True)
    (folder / "val.jsonl").write_text("".join(lines[:2] + lines[:1] + lines[3:]))
    with pytest.raises(ValueError, match=r"predictions.jsonl, line 4: holds .*question_id='2'.* question_id='0'"):
        run(*options, "--max_samples", 4)
    assert output.read_bytes() == scores
    for text, message in (
        ("[]\n", "line 1: expected a JSON object, found list of 0"),
        ("{}\n", "line 1: expected the key 'settings'"),
        ("settings\n", "line 1: not JSON"),
    ):
        predictions.write_text(text)
        with pytest.raises(ValueError, match=message):
            run(*options, "--max_samples", 4)


def test_answers_about_images_that_were_replaced_are_not_used(tmp_path, tiny, folder):
    options = ("--model", tiny, "--dataset", folder, "--batch_size", 4, "--output", tmp_path / "scores.json")
    run(*options)
    Image.open(folder / "0.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "9.png")
    with pytest.raises(
        ValueError, match=r"predictions.jsonl, line 11: the answer to '.*val.jsonl, line 10' was given"
    ):
        run(*options)


def test_scores_in_the_file_are_computed_anew(tmp_path, tiny, folder):
    output, predictions = tmp_path / "scores.json", tmp_path / "scores.json.predictions.jsonl"
    options = ("--model", tiny, "--dataset", folder, "--batch_size", 4, "--output", output)
    run(*options)
    whole, (head, *lines) = output.read_bytes(), predictions.read_text().split("\n")[:-1]
    rows = [json.loads(line) for line in lines]
    predictions.write_text(
        "\n".join([head, *(json.dumps(row | {"accuracy": 0.7, "any_match": 1}) for row in rows), ""])
    )
    run(*options)
    assert output.read_bytes() == whole
    for change, message in (
        (
            {"prediction": 3},
            "line 2: not an answered question: the question: key 'prediction' is 3, expected str or null",
        ),
        ({"answers": ["a"]}, "line 2: not an answered question: VQA accuracy needs the answers of at least 4"),
        ({"points": 3}, "line 2: not an answered question: .*'points'"),
    ):
        predictions.write_text("\n".join([head, *(json.dumps(row | change) for row in rows), ""]))
        with pytest.raises(ValueError, match=message):
            run(*options)
    predictions.write_text("\n".join([head, *lines, *lines, ""]))
    with pytest.raises(ValueError, match="holds 20 answers to 10 questions"):
        run(*options)


def test_outputs_that_differ_after_their_last_point_keep_their_own_answers(tmp_path, tiny):
    for name in ("a.naive", "a.aegis"):
        run("--model", tiny, "--max_samples", 2, "--metrics", "cross_entropy", "--output", tmp_path / name)
        assert (tmp_path / f"{name}.predictions.jsonl").exists()


def test_a_branch_on_the_hub_is_asked_at_its_commit(tmp_path, tiny, folder, monkeypatch):
    from transformers import AutoProcessor

    from hf_aegis.data import vqa_sources

    commits = {"org/model": "a" * 40, "org/set": "b" * 40}
    asked = []

    def info(repository, revision=None, timeout=None):
        return SimpleNamespace(sha=commits[repository])

    def load_vqa(source, split, *args, revision, config, **kwargs):
        asked.append((revision, config))
        return vqa_load(str(folder), split, *args, **kwargs)

    vqa_load, model_from_folder = vqa_sources.load_vqa, eval_vqa._load_model
    processor = AutoProcessor.from_pretrained(tiny)
    monkeypatch.setattr("huggingface_hub.model_info", info)
    monkeypatch.setattr("huggingface_hub.dataset_info", info)
    monkeypatch.setattr(vqa_sources, "load_vqa", load_vqa)
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda source, revision: asked.append(revision) or processor)

    def load_model(arguments, revision):
        asked.append(revision)
        arguments.model = tiny
        return model_from_folder(arguments, None)

    monkeypatch.setattr(eval_vqa, "_load_model", load_model)
    output = tmp_path / "scores.json"
    options = ("--model", "org/model", "--dataset", "org/set", "--dataset_config", "small", "--output", output)
    run(*options)
    assert asked == [("b" * 40, "small"), "a" * 40, "a" * 40]
    scores = json.loads(output.read_text())
    assert (scores["revision"], scores["dataset_revision"], scores["dataset_config"]) == ("a" * 40, "b" * 40, "small")
    commits["org/model"] = "c" * 40
    with pytest.raises(ValueError, match=f"other settings: revision is '{'a' * 40}' there and '{'c' * 40}' here"):
        run(*options)
    # The commit itself is the way to continue.
    run(*options, "--revision", "a" * 40)


@pytest.mark.parametrize(("metric", "absent"), [("cross_entropy", "accuracy"), ("accuracy", "cross_entropy")])
def test_one_metric_alone(tmp_path, tiny, folder, capsys, metric, absent):
    columns = '{"answer_type": null, "question_type": "answer_type"}'
    options = ("--dataset", folder, "--metrics", metric, "--output", tmp_path / "scores.json", "--columns", columns)
    run("--model", tiny, *options)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert metric in scores
    assert not {name for name in scores if name.startswith(absent)}
    assert scores["by_type"].keys() == {"other"}
    assert "by_answer_type" not in scores
    assert "-" in capsys.readouterr().out.splitlines()[1].split()


def test_weights_may_have_any_dtype(tmp_path, tiny):
    found = {}
    for dtype in eval_vqa.DTYPES:
        options = ("--max_samples", 4, "--metrics", "cross_entropy", "--dtype", dtype)
        run("--model", tiny, *options, "--output", tmp_path / dtype)
        found[dtype] = json.loads((tmp_path / dtype).read_text())["cross_entropy"]
    assert found["float64"] == pytest.approx(found["float32"], rel=1e-5)
    assert len(set(found.values())) == 4
    assert max(found.values()) == pytest.approx(min(found.values()), rel=0.1)


def test_no_dtype_of_a_training_run_is_refused():
    from hf_aegis.training.run_arguments import RunArguments

    assert set(get_args(get_type_hints(RunArguments)["dtype"])) <= set(eval_vqa.DTYPES)


def test_a_model_with_an_action_expert_can_be_scored(tmp_path, tiny_model, tiny_processor):
    from hf_aegis.models import PaliGemmaFlowForAction

    expert = {"expert_hidden_size": 32, "expert_num_layers": 1, "expert_num_heads": 4, "expert_intermediate_size": 32}
    PaliGemmaFlowForAction.from_vlm(tiny_model, **expert).save_pretrained(tmp_path)
    tiny_processor.save_pretrained(tmp_path)
    options = ("--device", "cpu", "--attn_implementation", "eager", "--revision", "main")
    run("--model", tmp_path, "--max_samples", 4, "--output", tmp_path / "scores.json", *options)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert {name: scores[name] for name in ("model", "revision", "attn_implementation", "device")} == {
        "model": tmp_path.name,
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
    nowhere = ("--model", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="--batch_size must be at least 1; found 0"):
        run("--batch_size", 0, *nowhere)
    with pytest.raises(ValueError, match="max_samples must lie between 1 and the 9673 questions"):
        run("--max_samples", 0, *nowhere)
    with pytest.raises(FileNotFoundError, match="missing does not exist"):
        run("--output", tmp_path / "missing" / "scores.json", *nowhere)
    with pytest.raises(ValueError, match=r"--columns must be a JSON object; found '\{'"):
        run("--columns", "{", *nowhere)
    with pytest.raises(ValueError, match=r"--columns must be a JSON object of column names; found '\[1\]'"):
        run("--columns", "[1]", *nowhere)
    with pytest.raises(ValueError, match="split='all'"):
        run("--split", "all", *nowhere)
