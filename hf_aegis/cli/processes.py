"""Commands in processes of their own, several side by side: they share no state, and memory is measured apart."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_aegis.cli import TRACEBACK_VARIABLE
from hf_aegis.cli.parent_process import PARENT_VARIABLE


_POLL_SECONDS = 0.5
# Microseconds of all cores together in each period of so many, or "max" (Linux, control groups v2).
_CGROUP_LIMIT = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True)
class Call:
    """
    A command to run.

    Args:
        name (`str`): Its log's name, without suffix.
        arguments (`tuple[str, ...]`): The command line after `hf-aegis`.
    """

    name: str
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Placement:
    """
    How commands share a machine.

    Args:
        jobs (`int`): Processes side by side.
        threads (`int`): Threads of each.
        gpus (`tuple[str, ...]`, *optional*): What each process in turn gets as its `CUDA_VISIBLE_DEVICES`.
    """

    jobs: int
    threads: int
    gpus: tuple[str, ...] = ()

    @classmethod
    def on_this_machine(cls, jobs: int | None = None, at_most: int | None = None) -> "Placement":
        """
        One process per GPU, or per core where there is none, and the cores shared among them. `OMP_NUM_THREADS` in the
        environment wins.

        Args:
            jobs (`int`, *optional*): Processes side by side, if not by the rule.
            at_most (`int`, *optional*): Limit of the rule: there are no more commands than this.
        """
        gpus, cores = visible_gpus(), available_cores()
        if jobs is None:
            jobs = len(gpus) or cores
            jobs = jobs if at_most is None else max(1, min(jobs, at_most))
        asked = os.environ.get("OMP_NUM_THREADS", "")
        return cls(jobs, int(asked) if asked.isdigit() else max(1, cores // jobs), gpus)


def available_cores() -> int:
    """The cores that this process may use, which in a container or a batch job are fewer than the machine has."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _CGROUP_LIMIT.read_text().split()
    except OSError:
        return own
    return own if quota == "max" else max(1, min(own, int(quota) // int(period)))


def visible_gpus() -> tuple[str, ...]:
    """The GPUs that torch finds, each as a value of `CUDA_VISIBLE_DEVICES`."""
    import torch

    count = torch.cuda.device_count()
    # Where only some of a machine's GPUs are visible, or parts of one, torch's own numbers would name others.
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return tuple((named or [str(index) for index in range(count)])[:count])


def run_calls(
    calls: Sequence[Call],
    logs: Path,
    placement: Placement,
    *,
    ended: Callable[[Call, str | None], None] | None = None,
    total: int | None = None,
    progress: Callable[[], int] | None = None,
) -> None:
    """
    Runs commands side by side, with a bar. What they say is added to their logs. On Linux they end with this process;
    upon SIGTERM they get it, too, and are waited for.

    Args:
        calls (`Sequence[Call]`): The commands, in the order in which they are started.
        logs (`Path`): Folder of the logs; created.
        placement (`Placement`): How many at a time, with what.
        ended (`Callable`, *optional*):
            Called when a command has ended, with `None` or with what went wrong, in one line that names the log. If it
            raises, the other commands are ended. By default it raises `OSError` for the first that fails.
        total (`int`, *optional*): Training steps of all commands, the bar's length; by default it counts commands.
        progress (`Callable`, *optional*): Training steps done so far.

    Raises:
        OSError: If a command fails and `ended` does not say otherwise.
    """
    from tqdm import tqdm

    logs.mkdir(parents=True, exist_ok=True)
    waiting, free = list(calls), list(range(placement.jobs))
    running: dict[int, _Process] = {}
    done = 0
    # What an earlier attempt did has taken no time of this one.
    initial = progress() if progress else 0
    unit = "step" if progress else "command"
    with _ending_upon_sigterm(), tqdm(total=total or len(calls), initial=initial, unit=unit, disable=None) as bar:
        try:
            while waiting or running:
                while waiting and free:
                    seat = free.pop(0)
                    running[seat] = _Process(waiting.pop(0), logs, _environment(placement, seat))
                time.sleep(_POLL_SECONDS)
                for seat, process in list(running.items()):
                    if (code := process.popen.poll()) is None:
                        continue
                    del running[seat]
                    free.append(seat)
                    done += 1
                    (ended or _raise)(process.call, process.failure(code) if code else None)
                bar.n = progress() if progress else done
                if progress:
                    bar.set_postfix_str(f"{done} of {len(calls)} commands", refresh=False)
                bar.refresh()
        finally:
            # A training saves a checkpoint first: all of them at once.
            for process in running.values():
                process.popen.terminate()
            for process in running.values():
                process.popen.wait()


@contextlib.contextmanager
def _ending_upon_sigterm() -> Iterator[None]:
    """A block that SIGTERM ends by an exception, with the exit status of a process that it ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("SIGTERM: the commands under way are ended; start it again to continue", file=sys.stderr, flush=True)
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Process:
    def __init__(self, call: Call, logs: Path, environment: dict[str, str]) -> None:
        self.call = call
        self.log = logs / f"{call.name}.log"
        with self.log.open("a") as file:
            self.start = file.tell()
            command = [sys.executable, "-m", "hf_aegis", *call.arguments]
            self.popen = subprocess.Popen(command, stdout=file, stderr=file, env=environment)

    def failure(self, code: int) -> str:
        said = self.log.read_bytes()[self.start :].decode(errors="replace")
        last = said.strip().splitlines()[-1:] or ["it said nothing"]
        return f"hf-aegis {self.call.arguments[0]} ended with code {code}: {last[0]} (all of it in {self.log})"


def _environment(placement: Placement, seat: int) -> dict[str, str]:
    return {
        "OMP_WAIT_POLICY": "PASSIVE",
        # A log has room for where an error came from.
        TRACEBACK_VARIABLE: "1",
        **os.environ,
        "OMP_NUM_THREADS": str(placement.threads),
        PARENT_VARIABLE: str(os.getpid()),
        **({"CUDA_VISIBLE_DEVICES": placement.gpus[seat % len(placement.gpus)]} if placement.gpus else {}),
    }


def _raise(call: Call, failure: str | None) -> None:
    if failure is not None:
        raise OSError(failure)
