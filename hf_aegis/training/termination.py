"""A training that is asked to end (SIGTERM) saves a checkpoint first."""

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy
from transformers.training_args import ParallelMode


logger = logging.getLogger(__name__)

EXIT_STATUS = 128 + signal.SIGTERM
"""What shells report of a process that SIGTERM ended."""


class SaveOnTermination(TrainerCallback):
    """
    Upon SIGTERM, lets the step under way end, has a checkpoint saved, and ends the process with status 143. Several
    processes do so after the same step, whichever of them got the signal.

    It comes before the callbacks that prepare a checkpoint in `on_step_end`.

    Attributes:
        asked (`bool`): Whether the signal has come to this process.
    """

    def __init__(self) -> None:
        # Of all processes: whether they end after the step under way.
        self.asked = self._ending = False

    @contextlib.contextmanager
    def listening(self, args: TrainingArguments) -> Iterator[None]:
        """
        A block that trains, once or, where smaller batches are tried, several times. The signal keeps its effect where
        no checkpoints are saved, where the program handles it itself, and outside of the main thread.
        """
        self.asked = self._ending = False
        unhandled = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        if not _saves(args) or not unhandled or threading.current_thread() is not threading.main_thread():
            yield
            return
        signal.signal(signal.SIGTERM, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self.asked:
            # It came when there was no step left to be saved after.
            signal.raise_signal(signal.SIGTERM)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not _saves(args):
            return
        self._ending = self.asked
        if args.parallel_mode == ParallelMode.DISTRIBUTED:
            asked = torch.tensor(int(self.asked), device=args.device)
            distributed.all_reduce(asked, distributed.ReduceOp.MAX)
            self._ending = bool(asked)
        control.should_save = control.should_save or self._ending

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self._ending:
            return
        if args.parallel_mode == ParallelMode.DISTRIBUTED:
            # What starts the processes ends all when one ends.
            distributed.barrier()
        if state.is_world_process_zero:
            checkpoint = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            logger.warning(
                "SIGTERM: the training ends after step %d of %d; started again it goes on from %s",
                state.global_step,
                state.max_steps,
                checkpoint,
            )
        raise SystemExit(EXIT_STATUS)


def _saves(args: TrainingArguments) -> bool:
    return args.save_strategy != SaveStrategy.NO


def keep_workers(loader: DataLoader) -> None:
    """
    Lets a loader's processes go on when SIGTERM comes, which is often sent to all processes of a job: the step under
    way needs them. They end when the loader does, or the process that has it, whose own SIGTERM still ends them.

    Systems that do not tell who sent a signal, such as macOS, leave the processes to end by it. Programs that a data
    set starts inherit that SIGTERM waits: end them by SIGKILL.
    """
    if hasattr(signal, "sigwaitinfo"):
        # What accelerate wraps around a loader hands on what is read of it, and not what is set.
        loader = getattr(loader, "base_dataloader", loader)
        loader.worker_init_fn = partial(_start_worker, loader.worker_init_fn)


def _start_worker(start: Callable[[int], None] | None, number: int) -> None:
    # Not ignored: PyTorch and multiprocessing end by it a process that is slow to end, and may wait until it has.
    # Blocked, in this thread and those that it starts, lest it have its effect in one of them.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    starter = multiprocessing.parent_process()
    # Not the parent of the operating system where a server forks the processes.
    parent = os.getppid() if starter is None else starter.pid
    threading.Thread(target=_end_by_parent, args=(parent,), name="SIGTERM", daemon=True).start()
    if start is not None:
        start(number)


def _end_by_parent(parent: int | None) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
