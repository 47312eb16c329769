"""Trainings in processes of their own that get signals, with processes that load data."""

import os
import signal

import pytest
import separate_process
import torch
from transformers import TrainerCallback

from hf_aegis.training import AEGISTrainer
from hf_aegis.training.termination import EXIT_STATUS


OPTIONS = {
    "max_steps": 12,
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
    # Slow enough that what the step under way needs is not loaded yet.
    with separate_process.running(separate_process.train, errors, tmp_path, OPTIONS, 0.03, True) as process:
        separate_process.wait_for(tmp_path / "third step", process)
        # To all processes of the job as schedulers do, and twice.
        os.killpg(process.pid, signal.SIGTERM)
        os.killpg(process.pid, signal.SIGTERM)
        assert separate_process.exit_status(process) == EXIT_STATUS == 143, errors.read_text()
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 3 <= step < 12
    assert errors.read_text().splitlines()[-1] == (
        f"SIGTERM: the training ends after step {step} of 12; started again it goes on from {checkpoint}"
    )
    resumed, whole = train("out", resume=True), train("whole")
    for (name, one), other in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other), name


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
    options = {"save_strategy": saving, "save_steps": 100, "max_steps": 100}
    with separate_process.running(target, tmp_path / "errors", tmp_path, options, 0.03) as process:
        separate_process.wait_for(tmp_path / "third step", process)
        os.kill(process.pid, signal.SIGTERM)
        assert separate_process.exit_status(process) == -signal.SIGTERM
    assert not list((tmp_path / "out").glob("checkpoint-*"))
