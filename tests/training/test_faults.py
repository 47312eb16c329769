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
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainerState

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
from hf_aegis.training.non_finite_guard import NonFiniteGuard


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
    (tmp_path / "trainer_state.json").write_text('{"global_step": 1}')
    assert find_fault(tmp_path) is None
    part = sorted(tmp_path.glob("model-*.safetensors"))[1]
    part.unlink()
    assert find_fault(tmp_path) == f"{part} is missing, which model.safetensors.index.json names"
    assert find_fault(tmp_path / "other") == f"there is no folder {tmp_path / 'other'}"


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", "[" * 100_000, r"config\.json \(100000 bytes\) cannot be read: .*nested too deeply"),
        ("config.json", "[]", "holds no JSON object"),
        (INDEX, "{}", r"index\.json: key 'weight_map' is missing"),
        (INDEX, "[]", r"index\.json: expected a JSON object"),
        (INDEX, '{"weight_map": {"a": ["b"], "c": 1}}', r"weight_map\['a'\] is \['b'\], expected the name of a file"),
        (
            INDEX,
            '{"weight_map": {"a": "../../../../etc/hostname"}}',
            "is '../../../../etc/hostname', expected",
        ),
        ("trainer_state.json", '{"global_step": "2"}', "key 'global_step' is '2', expected int"),
        ("trainer_state.json", '{"global_step": -2}', "key 'global_step' is -2, expected a count"),
        ("trainer_state.json", '{"global_step": 2, "total_flos": null}', "key 'total_flos' is None, expected a count"),
        ("trainer_state.json", '{"global_step": 2, "log_history": [1]}', "key 'log_history' holds something else"),
        ("trainer_state.json", '{"global_step": 2, "other": 1}', "the Trainer knows no key 'other'"),
    ],
)
def test_what_a_checkpoint_says_of_itself_is_looked_at(tmp_path, name, content, says):
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "trainer_state.json").write_text('{"global_step": 2}')
    assert find_fault(tmp_path) is None
    (tmp_path / name).write_text(content)
    fault = find_fault(tmp_path)
    assert fault.startswith(str(tmp_path / name))
    assert re.search(says, fault)


@pytest.mark.parametrize("value", ["many", None, -3, 2.5, True])
def test_what_a_callback_kept_is_looked_at(value):
    guard = NonFiniteGuard()
    kept = {"NonFiniteGuard": {"attributes": {"skipped_steps": value}}}
    with pytest.raises(ValueError, match=r"^trainer_state\.json of .* step 2, NonFiniteGuard: key 'skipped_steps' is"):
        guard.on_train_begin(None, TrainerState(global_step=2, stateful_callbacks=kept), None)
    assert guard.skipped_steps == 0


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
    assert message.startswith("3 steps in a row, up to step 7, changed nothing (max_skipped_steps=3). Their loss or")
    assert "learning rate that is too high (learning_rate=0.01, expert_learning_rate=0.0001)" in message
    assert message.endswith(
        f"The last whole checkpoint is {tmp_path / 'out' / 'checkpoint-6'}: started again, the training goes on from "
        "there"
    )
    assert trainer.non_finite_guard.skipped_steps == 5
    assert all(torch.isfinite(p).all() for p in model.parameters())


def break_weight(trainer):
    with torch.no_grad():
        trainer.model.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] = math.nan


BROKEN = r"not finite any more after step {}, first model\.layers\.1\.mlp\.up_proj\.weight: .* they are not saved\. .*"


def test_a_checkpoint_with_broken_weights_takes_the_place_of_none(make_trainer, tmp_path):
    out = tmp_path / "out"
    options = {"max_steps": 8, "save_steps": 1, "save_total_limit": 2}

    # Broken before a step, which is the first to be skipped, and is not saved.
    trainer = make_trainer(**options)
    trainer.add_callback(Between(2, lambda: break_weight(trainer)))
    says = rf"The last whole checkpoint is {out}/checkpoint-2: started again, the training goes on"
    with pytest.raises(NonFiniteTrainingError, match=BROKEN.format(2) + says):
        trainer.train()
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    # Broken by a step, whose checkpoint would be the next thing.
    trainer = make_trainer(**options)
    step = trainer.create_optimizer().step

    def breaking(*args, **kwargs):
        step(*args, **kwargs)
        break_weight(trainer)

    trainer.optimizer.step = breaking
    with pytest.raises(
        NonFiniteTrainingError, match=BROKEN.format(3) + rf"The last whole checkpoint is {out}/che.*-2:"
    ):
        trainer.train(resume_from_checkpoint=True)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    # One that was saved without this trainer may be broken nevertheless.
    make_trainer(**options | {"max_steps": 4}).train(resume_from_checkpoint=True)
    spoil(out / "checkpoint-4")
    with pytest.raises(NonFiniteTrainingError, match=rf"finite weights is {out}/checkpoint-3: delete checkpoint-4 "):
        make_trainer(**options).train(resume_from_checkpoint=True)
    spoil(out / "checkpoint-3")
    with pytest.raises(NonFiniteTrainingError, match=rf"No checkpoint in {out} has finite weights: delete"):
        make_trainer(**options).train(resume_from_checkpoint=True)


def spoil(checkpoint):
    """Makes one weight of a checkpoint NaN."""
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = math.nan
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_with_broken_weights_is_not_saved(make_language_model, make_args, token_dataset, tmp_path):
    model = get_peft_model(make_language_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    trainer = AEGISTrainer(model, make_args(**{**SAVING, "save_steps": 1}), train_dataset=token_dataset)
    weight = next(p for p in model.parameters() if p.requires_grad)
    trainer.add_callback(Between(1, lambda: weight.data.view(-1)[0].fill_(math.nan)))
    with pytest.raises(NonFiniteTrainingError, match=r"lora_A\.default\.weight: .* is .*/checkpoint-1: started again"):
        trainer.train()
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]


def test_why_no_step_changed_anything(make_trainer, tmp_path):
    # Also where any number of steps may be skipped.
    broken = make_trainer(max_skipped_steps=0)
    break_weight(broken)
    with pytest.raises(NonFiniteTrainingError, match=BROKEN.format(0) + "There is no whole checkpoint in"):
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
