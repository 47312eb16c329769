"""A training that gets SIGTERM, in a process of its own, with processes that load data."""

import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from hf_aegis.training import AEGISTrainer
from hf_aegis.training.termination import EXIT_STATUS


OPTIONS = {
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 100,
    "logging_steps": 2,
    "gradient_accumulation_steps": 2,
    "dataloader_num_workers": 1,
    "dataloader_pin_memory": False,
}
TERMINATED_RUN = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    from pathlib import Path
    from conftest import TokenDataset, make_anchor, make_args, make_language_model
    from transformers import TrainerCallback
    from hf_aegis.training import AEGISTrainer

    class Terminate(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                # Between two micro-batches, to all processes of the job as schedulers do, and twice.
                os.killpg(0, signal.SIGTERM)
                os.killpg(0, signal.SIGTERM)

    model = make_language_model.__wrapped__()()
    anchor = make_anchor.__wrapped__()(model)
    args = make_args.__wrapped__(Path({folder!r}))(**{options!r})
    trainer = AEGISTrainer(model, args, anchor=anchor, train_dataset=TokenDataset(24), callbacks=[Terminate()])
    trainer.train()
    print("trained on")
"""


def test_a_terminated_run_saves_first_and_ends_like_an_uninterrupted_one(
    make_language_model, make_anchor, make_args, token_dataset, tmp_path
):
    def train(folder, resume=None):
        model = make_language_model()
        args = make_args(output_dir=str(tmp_path / folder), **OPTIONS)
        AEGISTrainer(model, args, make_anchor(model), train_dataset=token_dataset).train(resume_from_checkpoint=resume)
        return model

    script = textwrap.dedent(TERMINATED_RUN).format(
        tests=str(Path(__file__).parent), folder=str(tmp_path / "terminated"), options=OPTIONS
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, start_new_session=True)
    assert ended.returncode == EXIT_STATUS == 143, ended.stderr
    assert "trained on" not in ended.stdout
    out = tmp_path / "terminated" / "out"
    assert ended.stderr.splitlines()[-1] == (
        f"SIGTERM: the training ends after step 3 of 6; started again it goes on from {out / 'checkpoint-3'}"
    )
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-3"]
    resumed, whole = train("terminated/out", resume=True), train("whole")
    for (name, one), other in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other), name


class Terminate(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            signal.raise_signal(signal.SIGTERM)


def test_the_signal_is_left_to_a_program_that_handles_it(make_language_model, make_args, token_dataset, tmp_path):
    def train(**changes):
        args = make_args(preserve="none", max_steps=2, **changes)
        AEGISTrainer(make_language_model(), args, train_dataset=token_dataset, callbacks=[Terminate()]).train()

    noted = []
    signal.signal(signal.SIGTERM, lambda number, frame: noted.append(number))
    try:
        train(save_strategy="steps", save_steps=2)
        # Nothing is to be saved.
        train()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert noted == [signal.SIGTERM] * 2

    saving = {"save_strategy": "steps", "save_steps": 2}
    with pytest.raises(SystemExit) as ended:
        train(output_dir=str(tmp_path / "ended"), **saving)
    assert ended.value.code == EXIT_STATUS
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    # Signals have handlers in main threads only.
    beside = threading.Thread(target=train_beside, args=(make_language_model(), make_args(**saving), token_dataset))
    beside.start()
    beside.join()
    assert (tmp_path / "out" / "checkpoint-6").is_dir()


def train_beside(model, args, dataset):
    args.preserve = "none"
    AEGISTrainer(model, args, train_dataset=dataset).train()
