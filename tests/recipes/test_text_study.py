"""The study on text, from both corpora to its tables and figure, with a tiny model, few samples and two steps."""

import dataclasses
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM


RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def recipe():
    """The study as a module: recipes are scripts, not a package. A script finds its neighbours by the search path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(RECIPES)
        yield importlib.import_module("text_study")


@pytest.fixture(scope="module")
def corpora(recipe):
    """What the study takes its texts by."""
    return sys.modules["text_study_corpora"]


@pytest.fixture(scope="module")
def tiny():
    """The shipped recipe, made tiny, with two of its conditions."""
    raw = yaml.safe_load((RECIPES / "text_study.yaml").read_text())
    raw["seeds"], raw["certificate_samples"], raw["jobs"] = [0], 2, 1
    raw["corpora"] |= {"vocab_size": 300, "context": 16, "max_samples": 12, "modules": ["bisect", "colorsys", "queue"]}
    raw["corpora"]["held_out_share"] = 0.3
    raw["model"] |= {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    raw["pretraining"] |= {"max_steps": 2, "per_device_train_batch_size": 4, "eval_steps": 2, "save_steps": 2}
    raw["training"] |= {"max_steps": 2, "per_device_train_batch_size": 4, "warmup_steps": 0, "learning_rate": 0.03}
    raw["conditions"] = {name: raw["conditions"][name] for name in ("naive", "subspace_99")}
    return raw


@pytest.fixture(scope="module")
def finished(recipe, tiny, tmp_path_factory):
    """A study that has been run to its end, and its results."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    config = dataclasses.replace(recipe.StudyConfig.from_yaml(folder / "tiny.yaml"), output_dir=str(folder / "out"))
    return config, recipe.study(config, runner=recipe.fine_tune)


@pytest.fixture
def copied(finished, tmp_path):
    """The finished study in another folder, to go on with."""
    config, results = finished
    shutil.copytree(config.folder, tmp_path / "out")
    return dataclasses.replace(config, output_dir=str(tmp_path / "out")), results


def forbidden(config, condition, seed):
    raise AssertionError(f"{condition} {seed} is finished")


def test_the_study_measures_what_is_kept_and_what_is_learned(finished):
    config, results = finished
    folder = config.folder
    assert json.loads((folder / "results.json").read_text()) == results
    assert (folder / "figures" / "trade_off.png").read_bytes().startswith(b"\x89PNG")
    naive, held = (results["conditions"][name]["measures"] for name in ("naive", "subspace_99"))
    for measures in (naive, held):
        change = measures["prose_loss"]["mean"] - results["before"]["prose_loss"]
        assert measures["prose_loss_change"]["mean"] == pytest.approx(change)
    assert naive["code_loss"]["mean"] < results["before"]["code_loss"]
    assert held["certificate_layers"]["mean"] < 0.5 * naive["certificate_layers"]["mean"]
    assert held["trainable_parameters"]["mean"] < naive["trainable_parameters"]["mean"]
    rows = (folder / "results.md").read_text().splitlines()
    assert [row.split(" | ")[0] for row in rows[2:5]] == ["| before fine-tuning", "| naive", "| subspace_99"]
    assert len((folder / "results.csv").read_text().splitlines()) == 3


def test_what_the_study_starts_from_is_kept_and_its_corpora_are_told(finished):
    config, results = finished
    tokenizer = AutoTokenizer.from_pretrained(config.folder / "model")
    text = "for each  byte\n\tthere is a token: ß"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    noted = results["settings"]["corpora"]
    assert all(len(noted[name]["sha256"]) == 64 for name in ("prose", "code"))
    documents = [name for part in ("train", "held_out") for name in noted["code"][part]["documents"]]
    assert sorted(documents) == ["bisect", "colorsys", "queue"]


def test_what_is_finished_is_not_repeated(recipe, copied):
    config, results = copied
    model = config.folder / "model" / "model.safetensors"
    before = model.stat().st_mtime_ns
    again = recipe.study(config, runner=forbidden)
    assert again["conditions"] == results["conditions"] and not again["failed"]

    lost = config.run_folder("subspace_99", 0) / "result.json"
    expected = json.loads(lost.read_text())
    lost.unlink()
    repeated = []
    recipe.study(config, runner=lambda *run: (repeated.append(run[1:]), recipe.fine_tune(*run)))
    assert repeated == [("subspace_99", 0)]
    assert model.stat().st_mtime_ns == before
    found = json.loads(lost.read_text())
    costs = ("step_ms", "step_processor_ms", "peak_memory_mb")
    assert {k: v for k, v in found.items() if k not in costs} == {k: v for k, v in expected.items() if k not in costs}


def test_a_run_that_fails_is_told_and_the_others_go_on(recipe, copied):
    config, _ = copied
    longer = dataclasses.replace(config, seeds=[0, 7, 8])

    def failing(config, condition, seed):
        if (condition, seed) != ("naive", 7):
            raise OSError(f"{condition} seed {seed} ended with code 1")
        recipe.fine_tune(config, condition, seed)

    results = recipe.study(longer, only=["naive"], runner=failing)
    assert results["failed"] == [{"condition": "naive", "seed": 8, "error": "naive seed 8 ended with code 1"}]
    assert results["conditions"]["naive"]["runs"] == 2
    assert results["conditions"]["subspace_99"]["runs"] == 1
    with pytest.raises(ValueError, match=r"only: unknown conditions \['aegsi'\]"):
        recipe.study(config, only=["aegsi"], runner=forbidden)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"certificate_samples": 3}, r"holds a study with other settings: certificate_samples is 2 there and 3 here"),
        ({"conditions": {"naive": {"preserve": "none", "learning_rate": 1.0}}}, r"naive holds runs .*learning_rate"),
    ],
    ids=["study", "condition"],
)
def test_other_settings_are_not_mixed_in(recipe, finished, change, message):
    with pytest.raises(ValueError, match=message):
        recipe.study(dataclasses.replace(finished[0], **change), runner=forbidden)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw | {"sede": 1}, r"tiny\.yaml: unknown keys \['sede'\]"),
        (lambda raw: {k: v for k, v in raw.items() if k != "seed"}, r"tiny\.yaml: missing keys \['seed'\]"),
        (lambda raw: raw | {"corpora": {"context": 8}}, r"tiny\.yaml: corpora: missing keys \['vocab_size', "),
        (lambda raw: raw | {"training": {"max_step": 1}}, r"tiny\.yaml: training: unknown keys \['max_step'\]"),
        (
            lambda raw: raw | {"conditions": {"mine": {"preserved": "none"}}},
            r"tiny\.yaml: conditions: mine: unknown keys \['preserved'\]",
        ),
        (
            lambda raw: raw | {"conditions": {"mine": {"preserve": "nothing"}}},
            r"tiny\.yaml: conditions: mine: preserve must be",
        ),
    ],
    ids=["unknown", "missing", "part", "training", "condition", "value"],
)
def test_a_wrong_option_is_refused_by_file_and_key(recipe, tiny, tmp_path, change, message):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(change(tiny)))
    with pytest.raises(ValueError, match=message):
        recipe.StudyConfig.from_yaml(path)


def test_the_shipped_recipe_is_whole(recipe, corpora):
    config = recipe.StudyConfig.from_yaml(RECIPES / "text_study.yaml")
    assert len(corpora.code_documents(config.corpora.modules)) == len(set(config.corpora.modules))
    assert len(config.seeds) >= 5


def test_no_paragraph_is_in_two_documents(corpora):
    documents = corpora.prose_documents()
    paragraphs = [" ".join(p.split()) for text in documents.values() for p in text.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs)) > 1000


def test_documents_are_held_out_whole(corpora):
    documents = {str(i): "x" * (10 + i) for i in range(50)}
    train, held_out = corpora.split(documents, 0.2, seed=3)
    assert train | held_out == documents and not train.keys() & held_out.keys()
    share = sum(map(len, held_out.values())) / sum(map(len, documents.values()))
    assert 0.15 < share <= 0.2
    assert corpora.split(documents, 0.2, seed=4)[1] != held_out
    with pytest.raises(ValueError, match=r"held_out_share=0\.0 leaves 50 documents of 50"):
        corpora.split(documents, 0.0, seed=3)
    with pytest.raises(ValueError, match=r"no file unittest\.py"):
        corpora.code_documents(["os", "unittest"])


def test_the_hash_is_of_names_and_texts(corpora):
    documents = {"a": "one", "b": "two"}
    assert corpora.fingerprint(documents) == corpora.fingerprint(dict(reversed(documents.items())))
    assert len({corpora.fingerprint(d) for d in (documents, {"a": "one"}, documents | {"b": "too"})}) == 3


def test_the_loss_is_the_models_own_on_whole_samples(recipe):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, **shape))
    samples = torch.randint(40, (recipe.EVALUATION_BATCH + 3, 9))
    expected = model(input_ids=samples, labels=samples).loss.item()
    assert recipe.held_out_loss(model, samples) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_the_command_runs_each_condition_in_a_process_of_its_own(tiny, tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny | {"output_dir": str(tmp_path / "out"), "jobs": 2}))
    command = [sys.executable, RECIPES / "text_study.py", "--config", tmp_path / "tiny.yaml"]
    subprocess.run(command, check=True, timeout=600)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [condition["runs"] for condition in results["conditions"].values()] == [1, 1]
