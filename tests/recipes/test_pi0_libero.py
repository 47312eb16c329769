"""The recipe that fine-tunes transformers' π0, with a tiny random one, on the shipped demonstrations and easy-VQA."""

import dataclasses
import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import PaliGemmaForConditionalGeneration, PI0ForConditionalGeneration, PI0Processor

from hf_aegis.anchors import ActivationAnchor
from hf_aegis.assets import EMBEDDED_VLM
from hf_aegis.models import PI0Collator, pi0_vlm


RECIPES = Path(__file__).parents[2] / "recipes"
STEPS = 3
CONDITIONS = yaml.safe_load((RECIPES / "pi0_libero.yaml").read_text())["conditions"]
# A method of each kind; the others run in the slow test.
QUICK = ("naive", "aegis", "aegis_two_pass", "a_gem", "pairs_90", "lora", "stop_gradient")
ADAPTED = {"lora": {"r": 2, "lora_alpha": 4}, "gse": {"r": 4, "num_experts": 4, "num_generalized": 1, "top_k": 2}}


@pytest.fixture(scope="module")
def recipe():
    """The study as a module: recipes are scripts, not a package. A script finds its neighbours by the search path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(RECIPES)
        yield importlib.import_module("pi0_libero")


@pytest.fixture(scope="module")
def tiny(pi0_checkpoint):
    """The shipped recipe with a tiny model and little data; its conditions are as they are, but for sizes."""
    raw = yaml.safe_load((RECIPES / "pi0_libero.yaml").read_text())
    raw |= {"model": str(pi0_checkpoint), "processor": str(EMBEDDED_VLM), "demonstrations": None, "flow_samples": 6}
    raw["anchored"] |= {"dataset": "easy-vqa", "split": "train", "samples": 12, "batch_size": 6}
    raw["holdout"] |= {"dataset": "easy-vqa", "split": "test", "samples": 6}
    raw["subspaces"] |= {"max_rank": 24}
    raw["training"] |= {"max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    raw["training"] |= {"learning_rate": 1e-2, "expert_learning_rate": 1e-2, "warmup_steps": 0, "logging_steps": 1}
    raw["training"] |= {"use_cpu": True, "disable_tqdm": True, "bf16": False, "optim": "adamw_torch"}
    raw["training"] |= {"save_strategy": "no"}
    for condition in raw["conditions"].values():
        condition |= {name: small for name, small in ADAPTED.items() if name in condition}
    raw["conditions"]["ewc"]["fisher_samples"] = 4
    return raw


@pytest.fixture(scope="module")
def whole(recipe, tiny, tmp_path_factory):
    """The study of all conditions, not run."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny, sort_keys=False))
    return dataclasses.replace(recipe.PI0Study.from_yaml(folder / "tiny.yaml"), output_dir=str(folder / "out"))


@pytest.fixture(scope="module")
def finished(recipe, whole):
    """The study of the quick conditions, run to its end, and its results."""
    study = dataclasses.replace(whole, conditions={name: whole.conditions[name] for name in QUICK})
    return study, recipe.run_study(study)


@pytest.fixture(scope="module")
def material(recipe, finished):
    return recipe.Material(finished[0])


def trained(study, condition):
    return PI0ForConditionalGeneration.from_pretrained(study.run_folder(condition, 0) / "model")


def weights(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def moved(study, condition):
    """What of the checkpoint's weights a condition has changed."""
    before, after = weights(study.load_model()), weights(trained(study, condition))
    assert before.keys() == after.keys()
    return [name for name in before if not torch.equal(before[name], after[name])]


def check_results(study, results):
    assert json.loads((study.folder / "results.json").read_text()) == results
    assert results["conditions"].keys() == study.conditions.keys()
    for name, condition in results["conditions"].items():
        measures = condition["measures"]
        assert condition["runs"] == 1 and measures["skipped_steps"]["mean"] == 0, name
        assert measures["flow_mse"]["mean"] != results["before"]["flow_mse"]
        assert measures["step_ms"]["mean"] > 0 and measures["step_processor_ms"]["mean"] > 0
        projected = CONDITIONS[name]["preserve"] in ("projection", "both")
        assert ("throttle_rate" in measures) == projected
        lines = (study.run_folder(name, 0) / "metrics.jsonl").read_text().splitlines()
        logged = [json.loads(line) for line in lines]
        assert [line["step"] for line in logged if "loss" in line] == [1, 2, 3]
    rows = (study.folder / "results.md").read_text().splitlines()
    first = next(iter(study.conditions))
    assert [row.split(" | ")[0] for row in rows[2:4]] == ["| before fine-tuning", f"| {first}"]
    assert "step, processor time (ms)" in rows[0]
    assert len((study.folder / "results.csv").read_text().splitlines()) == 1 + len(study.conditions)


def test_a_condition_of_each_kind_trains(finished):
    check_results(*finished)


@pytest.mark.slow
def test_all_other_conditions_train(recipe, whole, finished, tmp_path):
    others = {name: condition for name, condition in whole.conditions.items() if name not in QUICK}
    study = dataclasses.replace(whole, conditions=others, output_dir=str(tmp_path / "out"))
    shutil.copytree(finished[0].folder / "anchor", study.folder / "anchor")
    check_results(study, recipe.run_study(study))
    back = {name: p for name, p in weights(trained(study, "weight_interpolation")).items() if ".vlm." in name}
    start, end = weights(study.load_model()), weights(trained(finished[0], "naive"))
    for name, p in back.items():
        torch.testing.assert_close(p, (start[name] + end[name]) / 2, msg=name)


def test_each_condition_moves_what_it_says(finished):
    study, results = finished
    naive = moved(study, "naive")
    assert any("language_model.layers.0." in name for name in naive)
    assert any("embed_tokens" in name and ".vlm." in name for name in naive)
    # The vision tower is frozen, and the expert's own embeddings are never read.
    assert not [name for name in naive if "vision_tower" in name or ("dit" in name and "embed_tokens" in name)]
    alone = moved(study, "stop_gradient")
    assert alone and not any(".vlm." in name for name in alone)
    stopped = results["conditions"]["stop_gradient"]["measures"]
    assert stopped["vqa_cross_entropy"]["mean"] == results["before"]["vqa_cross_entropy"]
    adapted = [name for name in moved(study, "lora") if ".language_model." in name]
    assert adapted and all("_proj." in name for name in adapted)
    held = moved(study, "pairs_90")
    assert any("multi_modal_projector.linear.weight" in name for name in held)
    assert not any("norm" in name or "embed_tokens" in name for name in held if ".vlm." in name)


def test_both_forms_of_the_dual_backward_train_alike(finished):
    study, _ = finished
    start, streamed = weights(study.load_model()), weights(trained(study, "aegis"))
    for name, p in weights(trained(study, "aegis_two_pass")).items():
        change = p - start[name]
        assert (streamed[name] - p).norm() <= 1e-3 * change.norm() + 1e-6, name


def test_what_is_saved_is_what_was_measured(recipe, finished, material):
    study, results = finished
    for condition in ("naive", "lora"):
        measures = results["conditions"][condition]["measures"]
        folder = study.run_folder(condition, 0) / "model"
        model, info = PI0ForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        collator = PI0Collator(PI0Processor.from_pretrained(folder))
        error = recipe.flow_error(model, material.held_out, collator, study.flow_samples, batch_size=16)
        assert error == pytest.approx(measures["flow_mse"]["mean"], rel=1e-5)
        pi0_vlm(model).save_pretrained(folder / "vlm")
        vlm = PaliGemmaForConditionalGeneration.from_pretrained(folder / "vlm")
        answers = material.holdout.evaluate_cross_entropy(vlm)
        assert answers.cross_entropy == pytest.approx(measures["vqa_cross_entropy"]["mean"], rel=1e-5)
        assert measures["vqa_cross_entropy"]["mean"] != results["before"]["vqa_cross_entropy"]


def test_the_anchor_is_of_questions_to_its_vlm(finished):
    study, _ = finished
    anchor = ActivationAnchor.from_pretrained(study.folder / "anchor")
    anchor.check_compatible(study.load_model())
    assert anchor.fingerprint.dataset_id == "easy-vqa" and anchor.fingerprint.num_samples == 12
    assert "model.multi_modal_projector.linear" in anchor.subspaces


def test_the_error_counts_real_steps_and_dimensions(recipe, finished, material):
    study, _ = finished
    model = study.load_model()
    # The last items of an episode have few steps of their own. One by one, as batches of one are.
    dataset = torch.utils.data.Subset(material.held_out, [1, len(material.held_out) - 1])
    generator = torch.Generator().manual_seed(0)
    squared = []
    model.config.loss_reduction = "none"
    for item in dataset:
        batch = material.collator([item])
        noise = torch.randn(1, 8, 32, generator=generator)
        gammas = torch._standard_gamma(torch.tensor([[1.5, 1.0]]), generator=generator)
        timestep = 0.999 * gammas[:, 0] / gammas.sum(1) + 0.001
        with torch.no_grad():
            loss = model.eval()(**batch, noise=noise, timestep=timestep).loss
        squared += loss[0, ~item["action_is_pad"], :7].flatten().tolist()
    assert len(squared) == (8 + 1) * 7
    expected = sum(squared) / len(squared)
    assert recipe.flow_error(model, dataset, material.collator, 2, batch_size=1) == pytest.approx(expected, rel=1e-5)


def test_an_interrupted_run_continues(recipe, finished, tmp_path, monkeypatch):
    study, results = finished
    saving = {**study.training, "save_strategy": "steps", "save_steps": STEPS - 1, "save_total_limit": 2}
    study = dataclasses.replace(study, output_dir=str(tmp_path / "out"), training=saving)
    steps, training_step = [], recipe.AEGISTrainer.training_step
    monkeypatch.setattr(recipe.AEGISTrainer, "training_step", lambda *args: (steps.append(1), training_step(*args))[1])
    # What the runs start from is the same.
    shutil.copytree(finished[0].folder / "anchor", study.folder / "anchor")
    shutil.copy(finished[0].folder / "before.json", study.folder)
    recipe.run_study(study, only=["aegis"])
    folder = study.run_folder("aegis", 0)
    (folder / "result.json").unlink()
    shutil.rmtree(folder / f"checkpoint-{STEPS}")
    again = recipe.run_study(study, only=["aegis"])
    assert len(steps) == STEPS + 1
    for name in ("flow_mse", "vqa_cross_entropy", "throttle_rate", "cosine"):
        expected = results["conditions"]["aegis"]["measures"][name]["mean"]
        assert again["conditions"]["aegis"]["measures"][name]["mean"] == pytest.approx(expected, rel=1e-5), name


def test_what_is_finished_is_not_repeated(recipe, finished, monkeypatch):
    study, results = finished
    monkeypatch.setattr(recipe, "fine_tune", lambda *run: pytest.fail(f"{run[2:]} is finished"))
    assert recipe.run_study(study)["conditions"] == results["conditions"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flow_samples": 7}, r"holds a study with other settings: flow_samples is 6 there and 7 here"),
        ({"conditions": {"naive": {"preserve": "none", "learning_rate": 1.0}}}, r"naive holds runs .*learning_rate"),
    ],
    ids=["study", "condition"],
)
def test_other_settings_are_not_mixed_in(recipe, finished, change, message):
    with pytest.raises(ValueError, match=message):
        recipe.run_study(dataclasses.replace(finished[0], **change))


def test_unknown_conditions_are_refused(recipe, finished):
    with pytest.raises(ValueError, match=r"only: unknown conditions \['aegsi'\]"):
        recipe.run_study(finished[0], only=["aegsi"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sede": 1}, r"tiny\.yaml: unknown keys \['sede'\]"),
        ({"holdout": {"dataset": "easy-vqa"}}, r"tiny\.yaml: holdout: missing keys \['split', 'samples', 'batch_siz"),
        ({"training": {"max_step": 1}}, r"tiny\.yaml: training: unknown keys \['max_step'\]"),
        ({"conditions": {"mine": {"fast": {}}}}, r"tiny\.yaml: conditions: mine: unknown keys \['fast'\]"),
        ({"conditions": {"mine": {"preserve": "all"}}}, r"tiny\.yaml: conditions: mine: preserve must be"),
        ({"conditions": {"mine": {"lora": {}, "gse": {}}}}, r"tiny\.yaml: conditions: mine: lora and gse adapt"),
    ],
    ids=["unknown", "part", "training", "condition", "value", "adapters"],
)
def test_a_wrong_option_is_refused_by_file_and_key(recipe, tiny, tmp_path, change, message):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny | change))
    with pytest.raises(ValueError, match=message):
        recipe.PI0Study.from_yaml(path)


def test_checkpointing_is_refused_before_the_first_step(recipe, finished, material, tmp_path):
    training = {**finished[0].training, "activation_checkpointing": True}
    study = dataclasses.replace(finished[0], output_dir=str(tmp_path), training=training)
    with pytest.raises(ValueError, match="activation_checkpointing is not supported for PI0ForConditionalGeneration"):
        recipe.fine_tune(study, material, "naive", 0)


def test_the_shipped_recipe_is_whole(recipe, tmp_path):
    raw = yaml.safe_load((RECIPES / "pi0_libero.yaml").read_text())
    # What asks for a GPU when the arguments are made.
    raw["training"] |= {"use_cpu": True}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    study = recipe.PI0Study.from_yaml(tmp_path / "recipe.yaml")
    assert study.model == "lerobot/pi0_base" and study.arguments("aegis", 0).bf16
