"""Trainings in processes of their own that get signals, with processes that load data."""

import os
import signal
import subprocess
import time

import pytest
import separate_process
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback

from hf_aegis.training import AEGISTrainer, last_complete_checkpoint
from hf_aegis.training.json_lines import JSONLines
from hf_aegis.training.termination import EXIT_STATUS, keep_workers


OPTIONS = {
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 100,
    "logging_steps": 2,
    "gradient_accumulation_steps": 2,
    "dataloader_num_workers": 1,
    "dataloader_prefetch_factor": 1,
    "dataloader_pin_memory": False,
}


def test_a_terminated_run_saves_first_and_ends_like_an_uninterrupted_one(
    make_language_model, make_anchor, make_args, token_dataset, tmp_path
):
    def train(folder, resume=None):
        model = make_language_model()
        args = make_args(output_dir=str(tmp_path / folder), **OPTIONS)
        AEGISTrainer(model, args, make_anchor(model), train_dataset=token_dataset).train(resume_from_checkpoint=resume)
        return model

    errors = tmp_path / "errors"
    with separate_process.running(separate_process.train, errors, tmp_path, OPTIONS, True, True) as process:
        # The training waits for a batch of its third step, and another process for the test.
        for name in ("logged", "waiting"):
            separate_process.wait_for(tmp_path / name, process)
        # To all processes of the job as schedulers do, and twice.
        os.killpg(process.pid, signal.SIGTERM)
        os.killpg(process.pid, signal.SIGTERM)
        (tmp_path / "go").touch()
        assert separate_process.exit_status(process) == EXIT_STATUS == 143, errors.read_text()
    out = tmp_path / "out"
    assert errors.read_text().splitlines()[-1] == (
        f"SIGTERM: the training ends after step 3 of 6; started again it goes on from {out / 'checkpoint-3'}"
    )
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-3"]
    resumed, whole = train("out", resume=True), train("whole")
    for (name, one), other in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other), name


class Stuck(Dataset):
    """Says in a file that it is being read, and does not come back."""

    def __init__(self, file):
        self.file = file

    def __len__(self):
        return 1

    def __getitem__(self, index):
        self.file.touch()
        time.sleep(1000)


def test_a_loading_process_ends_by_its_parent_s_sigterm_alone(tmp_path):
    # PyTorch, and Python at its end, end so a process that is slow to end.
    loader = DataLoader(Stuck(tmp_path / "read"), num_workers=1)
    keep_workers(loader)
    batches = iter(loader)
    (process,) = batches._workers
    separate_process.wait_for(tmp_path / "read", process)
    subprocess.run(["sh", "-c", f"kill -TERM {process.pid}"], check=True)
    process.join(0.3)
    assert process.is_alive()
    process.terminate()
    assert separate_process.exit_status(process) == 0


def test_the_signal_is_not_forgotten_when_a_smaller_batch_is_tried(make_language_model, make_args, token_dataset):
    class EndAndRunOut(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            if trainer._train_batch_size == 4:
                signal.raise_signal(signal.SIGTERM)
                raise torch.OutOfMemoryError("CUDA out of memory.")

    args = make_args(preserve="none", auto_find_batch_size=True, save_strategy="epoch", gradient_accumulation_steps=2)
    trainer = AEGISTrainer(make_language_model(), args, train_dataset=token_dataset, callbacks=[EndAndRunOut()])
    with pytest.raises(SystemExit) as ended:
        trainer.train()
    assert ended.value.code == EXIT_STATUS
    assert trainer._train_batch_size < 4
    assert trainer.state.global_step == 1


def test_a_run_that_is_killed_while_it_saves_ends_like_an_uninterrupted_one(
    make_language_model, make_args, token_dataset, tmp_path
):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}

    def train(folder, resume=None):
        args = make_args(output_dir=str(tmp_path / folder), preserve="none", **options)
        AEGISTrainer(make_language_model(), args, train_dataset=token_dataset).train(resume_from_checkpoint=resume)
        return (tmp_path / folder / "checkpoint-6" / "model.safetensors").read_bytes()

    with separate_process.running(
        separate_process.train, tmp_path / "errors", tmp_path, options, False, False, 4
    ) as process:
        assert separate_process.exit_status(process) == -signal.SIGKILL
    assert (tmp_path / "out" / "checkpoint-4" / "model.safetensors").exists()
    assert last_complete_checkpoint(tmp_path / "out") == tmp_path / "out" / "checkpoint-2"
    assert train("out", resume=True) == train("whole")


@pytest.mark.slow
def test_ctrl_c_ends_a_command_which_goes_on_when_it_is_given_again(demonstrations, tmp_path):
    out, errors = tmp_path / "out", tmp_path / "errors"
    options = {
        "output_dir": out,
        "demonstrations": demonstrations,
        "chunk_size": 4,
        "expert": '{"expert_hidden_size": 16, "expert_num_layers": 1, "expert_intermediate_size": 32}',
        "preserve": "none",
        "max_steps": 30,
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "dataloader_num_workers": 1,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    command = ["train", *(str(word) for name, value in options.items() for word in (f"--{name}", value))]
    with separate_process.running(separate_process.run_command, errors, command) as process:
        separate_process.wait_for(out / "checkpoint-2" / "trainer_state.json", process)
        # As a terminal does.
        os.killpg(process.pid, signal.SIGINT)
        assert separate_process.exit_status(process) == 130, errors.read_text()
    assert "hf-aegis train: interrupted; start it again to continue" in errors.read_text().splitlines()
    done = last_complete_checkpoint(out)
    assert done is not None and not (out / "result.json").exists()
    with separate_process.running(separate_process.run_command, errors, command) as process:
        assert separate_process.exit_status(process) == 0, errors.read_text()
    assert (out / "result.json").exists()
    assert [r["step"] for r in JSONLines(out / "metrics.jsonl").read() if "loss" in r] == list(range(1, 31))


class Terminate(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            signal.raise_signal(signal.SIGTERM)


def test_the_signal_is_left_to_a_program_that_handles_it(make_language_model, make_args, token_dataset, tmp_path):
    def train(folder):
        args = make_args(output_dir=str(tmp_path / folder), preserve="none", max_steps=2, save_strategy="epoch")
        AEGISTrainer(make_language_model(), args, train_dataset=token_dataset, callbacks=[Terminate()]).train()

    noted = []
    signal.signal(signal.SIGTERM, lambda number, frame: noted.append(number))
    try:
        train("handled")
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert noted == [signal.SIGTERM]

    with pytest.raises(SystemExit) as ended:
        train("ended")
    assert ended.value.code == EXIT_STATUS
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(
    ("target", "saving"),
    [(separate_process.train, "no"), (separate_process.train_in_a_thread, "steps")],
    ids=["nothing is saved", "in a thread"],
)
def test_the_signal_ends_a_training_that_cannot_save(tmp_path, target, saving):
    options = {"save_strategy": saving, "save_steps": 100}
    with separate_process.running(target, tmp_path / "errors", tmp_path, options, True) as process:
        separate_process.wait_for(tmp_path / "waiting", process)
        os.kill(process.pid, signal.SIGTERM)
        assert separate_process.exit_status(process) == -signal.SIGTERM
    assert not list((tmp_path / "out").glob("checkpoint-*"))
