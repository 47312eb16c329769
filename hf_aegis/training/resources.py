"""What a training run costs: time per step and peak memory during steps."""

import resource
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def reset_peak_memory() -> None:
    """Starts a new measurement of [`peak_memory_mb`]."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif _CLEAR.exists():
        _CLEAR.write_text("5")


def peak_memory_mb() -> float:
    """
    Peak memory in MB since [`reset_peak_memory`]: allocated GPU memory where there is a GPU, otherwise the process's
    resident memory. Where the system cannot start a new measurement, the peak is that of the process's life.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


class ResourceCallback(TrainerCallback):
    """
    Measures optimiser steps, without the evaluations between them.

    Attributes:
        peak_mb (`float`): Highest memory during a step, in MB; see [`peak_memory_mb`].
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.peak_mb = 0.0
        self._start = 0.0

    @property
    def step_ms(self) -> float:
        """Median time of a step, in milliseconds; not a number before the first one."""
        return 1e3 * statistics.median(self.seconds) if self.seconds else float("nan")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        reset_peak_memory()
        self._synchronize()
        self._start = time.perf_counter()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._synchronize()
        self.seconds.append(time.perf_counter() - self._start)
        self.peak_mb = max(self.peak_mb, peak_memory_mb())

    @staticmethod
    def _synchronize() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
