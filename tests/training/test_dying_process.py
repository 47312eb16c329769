"""One of two training processes is killed; run as a script, this file is one of the two."""

import os
import signal
import sys
import time

import pytest
from transformers import TrainerCallback

from hf_aegis.training import AEGISConfig, AEGISTrainer, last_complete_checkpoint


class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_the_other_process_ends_and_the_last_checkpoint_stays(run_processes, tmp_path):
    started = time.monotonic()
    errors = run_processes(__file__, tmp_path, codes=(1, -signal.SIGKILL))
    # Long before the time limit of a collective operation.
    assert time.monotonic() - started < 240
    assert "Connection" in errors[0]
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


if __name__ == "__main__":
    # Beside this file, which is where a script is looked for.
    from conftest import TokenDataset, make_language_model

    args = AEGISConfig(
        output_dir=sys.argv[1],
        preserve="none",
        max_steps=6,
        save_strategy="steps",
        save_steps=2,
        per_device_train_batch_size=2,
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo",
        dataloader_pin_memory=False,
    )
    model = make_language_model.__wrapped__()()
    AEGISTrainer(model, args, train_dataset=TokenDataset(24), callbacks=[Kill()]).train()
