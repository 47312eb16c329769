"""Trainings that are pushed to the Hub, and resumed from it."""

import json
import pickle
import shutil
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_aegis.hub import HubDownloadError, HubUploadError
from hf_aegis.training import AEGISTrainer, hub_trainer
from hf_aegis.training.checkpoint_faults import find_fault
from hf_aegis.training.json_lines import JSONLines


REPO = "org/run"


@pytest.fixture
def make_trainer(make_language_model, make_args, token_dataset, tmp_path):
    """A trainer of a tiny language model that pushes each checkpoint, one after the other."""

    def make(folder="out", adapt=lambda model: model, **changes):
        pushing = {
            "push_to_hub": True,
            "hub_model_id": REPO,
            "hub_always_push": True,
            "save_strategy": "steps",
            "save_steps": 2,
            "max_steps": 4,
            "preserve": "none",
        }
        return AEGISTrainer(
            adapt(make_language_model()),
            make_args(output_dir=str(tmp_path / folder), **{**pushing, **changes}),
            train_dataset=token_dataset,
        )

    return make


@pytest.fixture
def no_pickles(monkeypatch):
    """Fails whoever reads a pickle other than through torch's restricted reader."""

    def refuse(*args, **kwargs):
        raise AssertionError("a pickle was read")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def titles(hub):
    return [commit.title for commit in reversed(hub.repo(REPO).history())][1:]


def test_nothing_is_pushed_unless_asked_for(hub, make_trainer):
    make_trainer(push_to_hub=False).train()
    assert hub.requests == []


@pytest.mark.parametrize(
    ("strategy", "checkpoints", "commits"),
    [
        ("end", set(), []),
        ("every_save", set(), ["step 2", "step 4"]),
        ("checkpoint", {"last-checkpoint"}, ["step 2", "step 4"]),
        ("all_checkpoints", {"checkpoint-2", "checkpoint-4"}, ["step 2", "step 4"]),
    ],
)
def test_each_strategy_pushes_what_it_says_in_one_commit_each(
    hub, make_trainer, tmp_path, strategy, checkpoints, commits
):
    trainer = make_trainer(hub_strategy=strategy, save_total_limit=1, hub_private_repo=True)
    trainer.train()
    assert titles(hub) == [f"Training in progress, {step}" for step in commits]
    trainer.push_to_hub()
    assert titles(hub)[len(commits) :] == ["End of training"]

    repository = hub.repo(REPO)
    files = repository.files()
    assert repository.private
    assert {name.split("/")[0] for name in files if "checkpoint" in name} == checkpoints
    assert {"README.md", "config.json", "metrics.jsonl", "model.safetensors"} <= files.keys()
    # Nothing that would have to be trusted, and nothing of this machine.
    assert not [name for name in files if "training_args" in name or name.startswith(".")]
    outside = [name for name in files if "/" not in name]
    assert not [name for name in outside if name.endswith((".bin", ".pt", ".pth"))]
    assert not list((tmp_path / "out").rglob("training_args.bin"))
    assert not list((tmp_path / "out").glob(".push-*"))
    texts = {n: c for n, c in files.items() if not n.endswith((".safetensors", ".pt", ".pth"))}
    assert not [name for name, content in texts.items() if str(tmp_path).encode() in content]
    assert not [name for name, content in files.items() if hub.token.encode() in content]
    for name in checkpoints:
        assert {f"{name}/optimizer.pt", f"{name}/trainer_state.json", f"{name}/model.safetensors"} <= files.keys()
    assert files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert files["metrics.jsonl"] == (tmp_path / "out" / "metrics.jsonl").read_bytes()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_s_checkpoints_have_the_run_s_card_and_no_path(hub, make_trainer, tmp_path):
    def adapt(model):
        # As of a model that was loaded from a folder.
        model.save_pretrained(tmp_path / "tiny")
        model.name_or_path = str(tmp_path / "tiny")
        return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))

    make_trainer(adapt=adapt, hub_strategy="checkpoint").train()
    files = hub.repo(REPO).files()
    assert {"adapter_model.safetensors", "last-checkpoint/adapter_model.safetensors"} <= files.keys()
    assert [name for name in files if name.endswith("README.md")] == ["README.md"]
    card = ModelCard(files["README.md"].decode())
    assert (card.data.library_name, card.data.base_model) == ("peft", None)
    assert "More Information Needed" not in card.content
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]


def test_checkpoints_are_pushed_in_their_order(hub, make_trainer, monkeypatch):
    real = hub_trainer.push_folder

    def slow_at_first(folder, *args, commit_message, **options):
        if commit_message.endswith("step 2"):
            time.sleep(1)
        return real(folder, *args, commit_message=commit_message, **options)

    monkeypatch.setattr(hub_trainer, "push_folder", slow_at_first)
    make_trainer(hub_strategy="every_save").train()
    assert titles(hub) == ["Training in progress, step 2", "Training in progress, step 4"]


def test_a_branch_is_pushed_to(hub, make_trainer):
    trainer = make_trainer(hub_strategy="every_save", hub_revision="experiment")
    trainer.train()
    trainer.push_to_hub()
    assert "model.safetensors" in hub.repo(REPO).files("experiment")
    assert "model.safetensors" not in hub.repo(REPO).files()


def test_a_push_that_fails_in_the_middle_is_a_warning(hub, make_trainer, caplog):
    trainer = make_trainer(hub_strategy="checkpoint")
    hub.fail_next("POST", "/commit/")
    trainer.train()
    assert trainer.state.global_step == 4
    assert titles(hub) == ["Training in progress, step 4"]
    (warning,) = [r.getMessage() for r in caplog.records if "was not pushed" in r.getMessage()]
    assert warning.startswith(f"checkpoint-2 was not pushed to {REPO}: the Hub failed with status 500")
    assert hub.token not in caplog.text


class FillWhilePushing(TrainerCallback):
    """Leaves no space for what is pushed of the first checkpoint, once that is written."""

    def __init__(self, disk):
        self.disk = disk

    def on_push_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.disk.fill()

    def on_step_begin(self, args, state, control, **kwargs):
        self.disk.empty()


def test_a_push_that_has_no_space_is_a_warning(hub, make_trainer, small_disk, caplog):
    out = small_disk.folder / "out"
    # As a killed process leaves it.
    (out / ".push-killed").mkdir(parents=True)
    trainer = make_trainer(out, hub_strategy="checkpoint")
    trainer.add_callback(FillWhilePushing(small_disk))
    trainer.train()
    assert [find_fault(out / name) for name in ("checkpoint-2", "checkpoint-4")] == [None, None]
    assert titles(hub) == ["Training in progress, step 4"]
    (warning,) = [r.getMessage() for r in caplog.records if "was not pushed" in r.getMessage()]
    assert warning.startswith(f"checkpoint-2 was not pushed to {REPO}: it could not be prepared in {out}: [Errno 28]")
    assert not list(out.glob(".push-*"))


def test_a_push_that_fails_at_the_end_loses_nothing(hub, make_trainer, tmp_path):
    trainer = make_trainer(hub_strategy="end")
    trainer.train()
    with hub.unreachable(), pytest.raises(HubUploadError) as raised:
        trainer.push_to_hub()
    message = str(raised.value)
    assert f"`hf-aegis push {tmp_path / 'out'} {REPO}`" in message
    assert hub.token not in message
    assert {"model.safetensors", "README.md", "config.json"} <= {p.name for p in (tmp_path / "out").iterdir()}
    # And again, from here.
    trainer.push_to_hub()
    assert hub.repo(REPO).files()["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("token", ["bad", "read only"])
def test_a_token_that_may_not_push_is_known_before_training(hub, make_trainer, token, monkeypatch):
    value = {"bad": hub.bad_token, "read only": hub.read_only_token}[token]
    with pytest.raises(HubUploadError) as raised:
        make_trainer(hub_token=value)
    assert value not in str(raised.value)
    monkeypatch.setenv("HF_TOKEN", value)
    with pytest.raises(HubUploadError, match=f"nothing can be pushed to the model repository {REPO}"):
        make_trainer()


def test_a_public_repository_is_not_taken_for_a_private_one(hub, make_trainer):
    make_trainer()
    with pytest.raises(HubUploadError, match="it exists and is public"):
        make_trainer(hub_private_repo=True)


@pytest.mark.parametrize("source", ["last-checkpoint", "checkpoint-2"])
def test_a_run_on_the_hub_is_resumed_as_a_local_one(hub, make_trainer, tmp_path, source, no_pickles):
    strategy = "checkpoint" if source == "last-checkpoint" else "all_checkpoints"
    make_trainer("whole", hub_strategy=strategy).train()
    local = make_trainer("local", push_to_hub=False)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "copy" / "checkpoint-2")
    shutil.copy(tmp_path / "whole" / "metrics.jsonl", tmp_path / "local")
    local.train(resume_from_checkpoint=str(tmp_path / "copy" / "checkpoint-2"))

    # As the Hub had it after the second step.
    first = hub.repo(REPO).history()[1]
    assert first.title == "Training in progress, step 2"
    resumed = make_trainer("resumed", push_to_hub=False)
    resumed.train(resume_from_checkpoint=f"{REPO}@{first.oid}")
    assert resumed.state.global_step == local.state.global_step == 4
    for own, other in zip(resumed.model.parameters(), local.model.parameters(), strict=True):
        assert torch.equal(own, other)

    def records(folder):
        return [r for r in JSONLines(tmp_path / folder / "metrics.jsonl").read() if "loss" in r]

    assert records("resumed") == records("local") == records("whole")
    assert [r["step"] for r in records("resumed")] == [1, 2, 3, 4]

    # Once it is in the cache, no network is needed.
    with hub.offline():
        again = make_trainer("again", push_to_hub=False)
        again.train(resume_from_checkpoint=f"{REPO}@{first.oid}")
    for own, other in zip(again.model.parameters(), local.model.parameters(), strict=True):
        assert torch.equal(own, other)


def test_what_cannot_be_resumed_says_why(hub, make_trainer, tmp_path):
    trainer = make_trainer(hub_strategy="end")
    trainer.train()
    trainer.push_to_hub()
    other = make_trainer("other", push_to_hub=False)
    for source, message in (
        (
            REPO,
            f"no checkpoint in the model repository {REPO} .revision main.* on the Hub: it has neither last-checkp",
        ),
        (f"{REPO}@v9", "no such branch, tag or commit"),
        ("org/missing", "no such repository, or it is private"),
    ):
        with pytest.raises(HubDownloadError, match=message):
            other.train(resume_from_checkpoint=source)
    with hub.offline(), pytest.raises(HubDownloadError, match="not in the cache"):
        other.train(resume_from_checkpoint="org/other")


def test_the_card_of_a_training(hub, make_trainer, tmp_path):
    trainer = make_trainer(hub_strategy="end")
    trainer.train()
    trainer.push_to_hub(tags=["mine"], dataset="org/data")
    card = ModelCard(hub.repo(REPO).files()["README.md"].decode())
    assert card.data.library_name == "transformers"
    assert {"mine", "naive", "hf-aegis"} <= set(card.data.tags)
    assert card.data.datasets == ["org/data"]
    assert "naive fine-tuning" in card.text
    assert "learning_rate: 0.01" in card.text
    assert json.loads(hub.repo(REPO).files()["config.json"])["model_type"] == "gemma2"
