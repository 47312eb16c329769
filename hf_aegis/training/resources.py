"""What a training run costs: time per step, and peak memory during steps and in their phases."""

import contextlib
import functools
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_aegis.training.resumable import ResumableCallback


PHASES = ("load", "forward", "backward", "optimizer", "evaluation")
"""
Parts of a training whose memory is told apart: making model and trainer; a micro-batch's forward pass with what comes
before its loss, such as a replayed batch; its backward pass with the projection; clipping, the optimiser's step and
what restores or averages weights after it; evaluations.
"""

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
# The highest peak of the phases that ended in the measurement under way: the system has one counter for both.
_highest = 0.0


def reset_peak_memory() -> None:
    """Starts a new measurement of [`peak_memory_mb`]."""
    global _highest
    _highest = 0.0
    _reset_counter()


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
    return max(_highest, _read_counter())


def _reset_counter() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif _can_reset_resident_peak():
        _CLEAR.write_text("5")


def _read_counter() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if _can_reset_resident_peak():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**10
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


class PhaseMemory:
    """
    Peak memory of each phase of a training, of this process and since this was made; a resumed training takes in those
    of its checkpoint.

    Attributes:
        peaks_mb (`dict[str, float]`): By phase, in MB; see [`PHASES`] and [`peak_memory_mb`].
    """

    def __init__(self) -> None:
        self.peaks_mb: dict[str, float] = {}
        self._phase: str | None = None

    def enter(self, phase: str) -> None:
        """Ends the phase under way, if there is one, and begins another."""
        self.leave()
        self._phase = phase

    def leave(self) -> None:
        """Ends the phase under way."""
        global _highest
        peak = _read_counter()
        _highest = max(_highest, peak)
        if self._phase is not None:
            self.note(self._phase, peak)
        self._phase = None
        _reset_counter()

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """The block is a phase."""
        self.enter(phase)
        try:
            yield
        finally:
            self.leave()

    def note(self, phase: str, peak_mb: float) -> None:
        """Takes in a peak that was measured elsewhere."""
        self.peaks_mb[phase] = round(max(peak_mb, self.peaks_mb.get(phase, 0.0)), 3)

    def figures(self) -> dict[str, float]:
        """The peaks as they are logged: `peak_memory_mb_<phase>`."""
        return {f"peak_memory_mb_{name}": self.peaks_mb[name] for name in PHASES if name in self.peaks_mb}


class PhaseMemoryCallback(ResumableCallback):
    """Ends the phase of the optimiser's step. A resumed run goes on with its checkpoint's peaks."""

    initial: ClassVar = {"peaks_mb": {}}

    def __init__(self, memory: PhaseMemory) -> None:
        self.memory = memory
        super().__init__()

    @property
    def peaks_mb(self) -> dict[str, float]:
        """The memory's; what is assigned is taken into them."""
        return self.memory.peaks_mb

    @peaks_mb.setter
    def peaks_mb(self, earlier: dict[str, float]) -> None:
        for phase, peak in earlier.items():
            self.memory.note(phase, peak)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.memory.leave()


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

    # What other callbacks do to the weights in `on_optimizer_step` lies before this, and is a part of the step; what
    # they do in `on_step_end` is one only where they come before this one.
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
