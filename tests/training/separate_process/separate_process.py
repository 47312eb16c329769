"""
Trainings in processes of their own, each the leader of its group, for tests that end them by signals.

They are forked from one process that has imported what they need, so that this is paid for once.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any


TRAINING_TESTS = Path(__file__).parents[1]
# What takes long to import, which packages put off until it is used.
PRELOADED = [
    "h5py",
    "hf_aegis.training.aegis_trainer",
    "hf_aegis.training.run",
    "pytest",
    "transformers.models.gemma2.modeling_gemma2",
]
SECONDS = 300


@contextlib.contextmanager
def running(target: Callable[..., Any], errors: Path, *arguments: Any) -> Iterator[BaseProcess]:
    """A process that calls `target`, one of this module's functions, and writes its standard error into a file."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_lead, args=(target, errors, arguments))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def wait_for(path: Path, process: BaseProcess) -> None:
    """Waits until a process has made a file or folder."""
    latest = time.monotonic() + SECONDS
    while not path.exists():
        assert process.is_alive() and time.monotonic() < latest, f"{process} has not made {path}"
        time.sleep(0.02)


def exit_status(process: BaseProcess) -> int | None:
    """What a process ends with, negative for a signal; `None` if it does not end."""
    process.join(SECONDS)
    return process.exitcode


def _lead(target: Callable[..., Any], errors: Path, arguments: tuple[Any, ...]) -> None:
    os.setsid()
    # Its own processes start as they do elsewhere.
    multiprocessing.set_start_method(None, force=True)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    sys.path.insert(0, str(TRAINING_TESTS))
    target(*arguments)


def train(
    folder: Path, options: dict[str, Any], waits: bool = False, projects: bool = False, kill_in: int = 0
) -> None:
    """
    Trains a tiny model, and makes the file `folder/logged` once the second step is over and logged.

    Args:
        folder (`Path`): For the output, in `out`.
        options (`dict[str, Any]`): Of the arguments.
        waits (`bool`, *optional*, defaults to `False`): Whether what loads data makes the file `folder/waiting` within
            the sixth batch, and goes on when there is `folder/go`.
        projects (`bool`, *optional*, defaults to `False`): Whether there is an anchor.
        kill_in (`int`, *optional*, defaults to `0`): The step whose checkpoint the process does not survive: it is
            killed once the optimiser's state is half-written.
    """
    from conftest import TokenDataset, make_anchor, make_args, make_language_model
    from transformers import TrainerCallback

    from hf_aegis.training import AEGISTrainer

    class Note(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            if state.global_step == 2:
                (folder / "logged").touch()

    class Dataset(TokenDataset):
        drawn = 0

        def __getitem__(self, index):
            self.drawn += 1
            if waits and self.drawn == 21:
                (folder / "waiting").touch()
                latest = time.monotonic() + SECONDS
                while not (folder / "go").exists() and time.monotonic() < latest:
                    time.sleep(0.02)
            return super().__getitem__(index)

    class Trainer(AEGISTrainer):
        def _save_optimizer_and_scheduler(self, output_dir):
            super()._save_optimizer_and_scheduler(output_dir)
            if self.state.global_step == kill_in:
                file = Path(output_dir) / "optimizer.pt"
                os.truncate(file, file.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

    model = make_language_model.__wrapped__()()
    anchor = make_anchor.__wrapped__()(model) if projects else None
    args = make_args.__wrapped__(folder)(preserve="projection" if projects else "none", **options)
    Trainer(model, args, anchor, train_dataset=Dataset(24), callbacks=[Note()]).train()


def train_in_a_thread(folder: Path, options: dict[str, Any], waits: bool) -> None:
    """As `train`, beside a main thread that waits for it."""
    beside = threading.Thread(target=train, args=(folder, options, waits))
    beside.start()
    beside.join()


def run_command(arguments: list[str]) -> None:
    """Runs `hf-aegis` with arguments."""
    from hf_aegis.cli import main

    # Of what it writes only the errors are looked at.
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    sys.exit(main(arguments))
