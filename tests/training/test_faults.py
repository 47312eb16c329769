"""What goes wrong beside a training: a full disk, damaged checkpoints, lost data, gradients that are not finite."""

import contextlib
import math
import os
import re
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import Dataset
from transformers import TrainerCallback

from hf_aegis.anchors import ActivationAnchor, SubspaceOptions
from hf_aegis.training import (
    AEGISTrainer,
    DataLoadingError,
    ModelNotSavedError,
    NonFiniteTrainingError,
    last_complete_checkpoint,
)
from hf_aegis.training.checkpoint_faults import find_fault
from hf_aegis.training.checkpoint_writing import naming_folder
from hf_aegis.training.json_lines import JSONLines


SAVING = {"preserve": "none", "save_strategy": "steps", "save_steps": 2}


@pytest.fixture
def make_trainer(make_language_model, make_args, token_dataset):
    def make(train_dataset=None, callbacks=None, **changes):
        args = make_args(**{**SAVING, **changes})
        return AEGISTrainer(
            make_language_model(), args, train_dataset=train_dataset or token_dataset, callbacks=callbacks
        )

    return make


class Between(TrainerCallback):
    """Does something once, before a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


@contextlib.contextmanager
def largest_file(size):
    """Nothing is written beyond so many bytes of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


SIZED = ("model.safetensors", "optimizer.pt")


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(make_trainer, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    make_trainer(output_dir=str(whole)).train()
    weights, optimizer = ((whole / "checkpoint-2" / name).stat().st_size for name in SIZED)
    assert weights < optimizer
    for limit in (weights // 2, optimizer - 1000):
        with contextlib.ExitStack() as full:
            callback = Between(3, lambda limit=limit, full=full: full.enter_context(largest_file(limit)))
            with pytest.raises(ModelNotSavedError) as caught:
                make_trainer(callbacks=[callback]).train(resume_from_checkpoint=True)
        message = str(caught.value)
        assert message.startswith(f"{out / 'checkpoint-4'} could not be written: ")
        assert re.search(r"\(0\.\d MiB are there, and [1-9]\d*\.\d MiB are free\)\. ", message)
        assert f"The last whole checkpoint is {out / 'checkpoint-2'}: started again, the training goes on" in message
        assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    make_trainer().train(resume_from_checkpoint=True)
    assert len({(folder / "checkpoint-6" / "model.safetensors").read_bytes() for folder in (out, whole)}) == 1


def test_a_full_disk_leaves_the_checkpoint_before(make_trainer, small_disk, tmp_path):
    out, whole = small_disk.folder / "out", tmp_path / "whole"
    make_trainer(output_dir=str(whole)).train()
    weights, optimizer = ((whole / "checkpoint-2" / name).stat().st_size for name in SIZED)
    cases = (
        (weights // 2, r"No space left on device .* MiB are free\)\. "),
        # PyTorch does not say so.
        (weights + optimizer // 2, r"unexpected pos .* 0\.0 MiB are free: the disk is full\)\. "),
    )
    for left, said in cases:
        callback = Between(3, lambda left=left: small_disk.fill(left))
        with pytest.raises(ModelNotSavedError) as caught:
            make_trainer(output_dir=str(out), callbacks=[callback]).train(resume_from_checkpoint=True)
        message = str(caught.value)
        assert message.startswith(f"{out / 'checkpoint-4'} could not be written: ")
        assert re.search(said, message)
        assert f"The last whole checkpoint is {out / 'checkpoint-2'}: started again, the training goes on" in message
        assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
        small_disk.empty()
    make_trainer(output_dir=str(out)).train(resume_from_checkpoint=True)
    assert len({(folder / "checkpoint-6" / "model.safetensors").read_bytes() for folder in (out, whole)}) == 1


def test_what_does_not_come_from_writing_is_not_told_as_that(tmp_path):
    with pytest.raises(RuntimeError) as caught, naming_folder(tmp_path):
        # Of a process that waits for another one, which has died.
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:12345")
    assert not isinstance(caught.value, ModelNotSavedError)
    for write in (lambda path: torch.save({}, path), lambda path: save_file({}, path), Path.touch):
        with pytest.raises(ModelNotSavedError, match=r"none could not be written"), naming_folder(tmp_path / "none"):
            write(tmp_path / "none" / "file")


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    lines = JSONLines(tmp_path / "metrics.jsonl")
    with largest_file(100), pytest.raises(OSError, match=r"File too large: '.*/metrics\.jsonl'"):
        lines.append([{"step": step, "loss": 1.0} for step in range(20)])


def test_a_log_on_a_full_disk_is_named_and_goes_on(small_disk):
    lines = JSONLines(small_disk.folder / "metrics.jsonl")
    records = [{"step": step, "loss": 1.0} for step in range(1000)]
    small_disk.fill(2**12)
    with pytest.raises(OSError, match=r"No space left on device: '.*/metrics\.jsonl'"):
        lines.append(records)
    small_disk.empty()
    written = len(lines.read())
    assert 0 < written < 1000
    lines.append(records[written:])
    assert lines.read() == records


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def zero(path):
    # As a machine without power leaves what it had not written yet.
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES = {
    "cut weights": ("model.safetensors", cut),
    "zeroed weights": ("model.safetensors", zero),
    "no weights": ("model.safetensors", lambda path: path.unlink()),
    "cut optimiser": ("optimizer.pt", cut),
    "no optimiser": ("optimizer.pt", lambda path: path.unlink()),
    "cut schedule": ("scheduler.pt", cut),
    "cut random states": ("rng_state.pth", cut),
    "no random states": ("rng_state.pth", lambda path: path.unlink()),
    "cut configuration": ("config.json", cut),
}


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(make_trainer, tmp_path, caplog):
    whole = make_trainer(max_steps=4)
    whole.train()
    out, kept = tmp_path / "out", tmp_path / "kept"
    for name in ("checkpoint-2", "checkpoint-4"):
        assert find_fault(out / name) is None
    shutil.copytree(out, kept)
    for name, damage in DAMAGES.values():
        damage(out / "checkpoint-4" / name)
        caplog.clear()
        assert last_complete_checkpoint(out) == out / "checkpoint-2", name
        passed_over, chosen = (record.getMessage() for record in caplog.records)
        assert passed_over.startswith(f"{out / 'checkpoint-4'} is passed over: {out / 'checkpoint-4'}")
        assert name.split(".")[0] in passed_over or "holds no weights" in passed_over
        assert chosen == f"{out / 'checkpoint-2'} is the newest checkpoint that can be read"
        with pytest.raises(ValueError, match=r"checkpoint-4 cannot be resumed: .*checkpoint-4"):
            make_trainer().train(resume_from_checkpoint=str(out / "checkpoint-4"))
        shutil.rmtree(out / "checkpoint-4")
        shutil.copytree(kept / "checkpoint-4", out / "checkpoint-4")

    # One that was written to its end and one that was not: where to begin is for the user to say.
    cut(out / "checkpoint-2" / "optimizer.pt")
    cut(out / "checkpoint-4" / "trainer_state.json")
    with pytest.raises(ValueError, match=r"no checkpoint in .*out can be resumed: .*optimizer\.pt \(\d+ bytes\) can"):
        make_trainer().train(resume_from_checkpoint=True)
    shutil.copytree(kept / "checkpoint-2", out / "checkpoint-2", dirs_exist_ok=True)
    resumed = make_trainer(max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert find_fault(out / "checkpoint-4") is None


def test_a_checkpoint_in_parts_needs_all_of_them(tmp_path, make_language_model):
    make_language_model().save_pretrained(tmp_path, max_shard_size="40KB")
    (tmp_path / "trainer_state.json").write_text("{}")
    assert find_fault(tmp_path) is None
    part = sorted(tmp_path.glob("model-*.safetensors"))[1]
    part.unlink()
    assert find_fault(tmp_path) == f"{part} is missing, which model.safetensors.index.json names"
    assert find_fault(tmp_path / "other") == f"there is no folder {tmp_path / 'other'}"


@pytest.mark.parametrize("preserve", ["none", "projection", "both"])
def test_a_training_ends_after_many_steps_without_finite_gradients(
    make_language_model, make_args, token_dataset, tmp_path, preserve
):
    model = make_language_model()
    rows = [token_dataset[index] for index in range(8)]
    batch = {key: torch.stack([row[key] for row in rows]) for key in ("input_ids", "attention_mask")}
    subspaces = SubspaceOptions(energy=0.5) if preserve == "both" else None
    anchor = ActivationAnchor.collect(model, [batch], subspaces=subspaces, progress=False)
    args = make_args(preserve=preserve, max_skipped_steps=3, max_steps=20, save_strategy="steps", save_steps=2)
    trainer = AEGISTrainer(model, args, anchor, train_dataset=token_dataset)
    compute_loss = trainer.compute_loss

    def poisoned(*arguments, **options):
        # Two in a row, one that is well, and then none any more.
        finite = trainer.state.global_step in (0, 3)
        return compute_loss(*arguments, **options) * (1.0 if finite else math.inf)

    trainer.compute_loss = poisoned
    with pytest.raises(NonFiniteTrainingError) as caught:
        trainer.train()
    message = str(caught.value)
    assert message.startswith("3 steps in a row, up to step 7, changed nothing (max_skipped_steps=3). Their gradients")
    assert "learning rate that is too high (learning_rate=0.01, expert_learning_rate=0.0001)" in message
    assert message.endswith(
        f"The last whole checkpoint is {tmp_path / 'out' / 'checkpoint-6'}: started again, the training goes on from "
        "there"
    )
    assert trainer.non_finite_guard.skipped_steps == 5
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_why_no_step_changed_anything(make_trainer, tmp_path):
    broken = make_trainer(max_skipped_steps=2)
    with torch.no_grad():
        broken.model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(NonFiniteTrainingError, match=r"not finite any more, first model\.layers\.1\.mlp\.up_proj\.w"):
        broken.train()

    def forget(args, state, control, model=None, **kwargs):
        model.zero_grad()

    lost = make_trainer(max_skipped_steps=2, max_steps=3)
    lost.callback_handler.callbacks.insert(0, type("Forget", (TrainerCallback,), {})())
    lost.callback_handler.callbacks[0].on_pre_optimizer_step = forget
    with pytest.raises(NonFiniteTrainingError, match=r"no gradients at all.*There is no whole checkpoint in"):
        lost.train()
    # Without an end.
    unending = make_trainer(max_skipped_steps=0, max_steps=3, save_strategy="no")
    unending.callback_handler.callbacks.insert(0, lost.callback_handler.callbacks[0])
    unending.train()
    assert unending.non_finite_guard.skipped_steps == 3


class Reading(Dataset):
    """Token sequences that are prepared by something that may fail."""

    def __init__(self, rows, prepare):
        self.rows, self.prepare = rows, prepare

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.prepare(index)
        return self.rows[index]


LOADING = {"dataloader_num_workers": 1, "dataloader_pin_memory": False, "dataloader_prefetch_factor": 1}


def test_a_loading_process_that_dies_is_told(make_trainer, token_dataset, tmp_path):
    drawn = tmp_path / "drawn"

    def prepare(index):
        with drawn.open("a") as file:
            file.write(".")
        if drawn.stat().st_size > 17:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer = make_trainer(Reading(token_dataset, prepare), **LOADING)
    with pytest.raises(DataLoadingError) as caught:
        trainer.train()
    message = str(caught.value)
    # PyTorch may hear of it in two ways.
    said = (
        r"DataLoader worker \(pid.* (is killed by signal: Killed|exited unexpectedly): of 1 processes that load data"
    )
    assert re.match(said, message)
    assert "set dataloader_num_workers lower" in message
    assert f"The last whole checkpoint is {tmp_path / 'out' / 'checkpoint-2'}: started again" in message


def test_a_loading_process_that_dies_after_sigterm_is_not_short_of_memory(make_trainer, token_dataset):
    def prepare(index):
        os.kill(os.getppid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(DataLoadingError, match=r"The training got SIGTERM.*There is no whole checkpoint") as caught:
        make_trainer(Reading(token_dataset, prepare), **LOADING).train()
    assert "memory" not in str(caught.value)


def test_demonstrations_that_disappear_are_named(make_trainer, token_dataset, demonstrations, tmp_path):
    from hf_aegis.data import LiberoDataset

    shutil.copytree(demonstrations, tmp_path / "data")
    libero = LiberoDataset(tmp_path / "data", chunk_size=4)
    file = sorted((tmp_path / "data").iterdir())[0]
    file.unlink()
    trainer = make_trainer(Reading(token_dataset, lambda index: libero[0]), **LOADING)
    with pytest.raises(FileNotFoundError) as caught:
        trainer.train()
    # Without the traceback of another process, which is where it came from.
    assert str(caught.value) == f"{file}: no such file"
    assert "Original Traceback" in str(caught.value.__cause__)
