"""What a training run costs: time per step and peak memory during steps."""

import functools
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_aegis.training.resumable import ResumableCallback


_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def reset_peak_memory() -> None:
    """Starts a new measurement of [`peak_memory_mb`]."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif _can_reset_resident_peak():
        _CLEAR.write_text("5")


@functools.cache
def _can_reset_resident_peak() -> bool:
    try:
        _CLEAR.write_text("5")
    except OSError:
        # Not Linux, or a sandbox that does not let a process write there.
        return False
    return True


def peak_memory_mb() -> float:
    """
    Peak memory in MB since [`reset_peak_memory`]: allocated GPU memory where there is a GPU, otherwise the process's
    resident memory. Where the system cannot start a new measurement, the peak is that of the process's life.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if _can_reset_resident_peak():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**10
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


class ResourceCallback(ResumableCallback):
    """
    Measures optimiser steps, without the evaluations between them. A resumed run goes on with its checkpoint's.

    Attributes:
        seconds (`list[float]`): Time of each step, in seconds.
        processor_seconds (`list[float]`):
            Processor time of each step, of all threads, in seconds. Other work on the machine hardly changes it.
        peak_mb (`float`): Highest memory during a step, in MB; see [`peak_memory_mb`].
    """

    initial: ClassVar = {"seconds": [], "processor_seconds": [], "peak_mb": 0.0}
    seconds: list[float]
    processor_seconds: list[float]
    peak_mb: float
    _start = _processor_start = 0.0

    @property
    def step_ms(self) -> float:
        """Median time of a step, in milliseconds; not a number before the first one."""
        return _median_ms(self.seconds)

    @property
    def step_processor_ms(self) -> float:
        """Median processor time of a step, in milliseconds; not a number before the first one."""
        return _median_ms(self.processor_seconds)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        reset_peak_memory()
        self._synchronize()
        self._start, self._processor_start = time.perf_counter(), time.process_time()

    # What other callbacks do to the weights after an optimiser step is a part of the step.
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._synchronize()
        self.seconds.append(round(time.perf_counter() - self._start, 6))
        self.processor_seconds.append(round(time.process_time() - self._processor_start, 6))
        self.peak_mb = max(self.peak_mb, peak_memory_mb())

    @staticmethod
    def _synchronize() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def _median_ms(seconds: list[float]) -> float:
    return 1e3 * statistics.median(seconds) if seconds else float("nan")
