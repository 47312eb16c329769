"""A reader in a process of its own, which may run out of memory, hang or crash without harm to who asks it."""

import faulthandler
import multiprocessing
import os
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from json import JSONDecodeError
from multiprocessing.connection import Connection
from pathlib import Path
from types import CodeType, FrameType
from typing import Any


PACKAGE = str(Path(__file__).parents[3] / "hf_aegis") + os.sep

# Value errors that say nothing of the file: a reader's own error takes their place.
RAW_ERRORS = (UnicodeError, JSONDecodeError)


@dataclass(frozen=True)
class Finding:
    """
    An input that a reader did not read and did not refuse as it says it does.

    Args:
        data (`bytes`): The input.
        fault (`str`): Name of the exception, `"time"`, `"crash (SIGSEGV)"`, or `"unnamed ValueError"` for an allowed
            one that does not name the file.
        detail (`str`): The exception's text and where it came from.
    """

    data: bytes
    fault: str
    detail: str


@dataclass(frozen=True)
class Outcome:
    """What became of one input: what the reader raised, if anything, a fault or none, and the new lines it reached."""

    raised: str | None
    fault: str | None = None
    detail: str = ""
    new_lines: int = 0


class ReaderProcess:
    """
    Args:
        reader (`Callable[[bytes], Any]`): What reads.
        allowed (`tuple`): Exceptions that it documents.
        naming (`str`, *optional*): What each of them has to name.
        seconds (`float`): Most time for an input.
        memory (`int`): Most bytes of address space that the process takes beyond what it starts with.
        coverage (`bool`): Whether lines of the package are counted.
    """

    def __init__(
        self,
        reader: Callable[[bytes], Any],
        allowed: tuple[type[BaseException], ...],
        naming: str | None,
        seconds: float,
        memory: int,
        coverage: bool,
    ):
        self._arguments = (reader, allowed, naming, memory)
        self._seconds = seconds
        self._lines = Lines() if coverage else None
        self._process: Any = None
        self._connection: Connection

    def read(self, data: bytes) -> Outcome:
        """Reads one input."""
        if self._process is None:
            self._start()
        self._connection.send_bytes(data)
        try:
            if self._connection.poll(self._seconds):
                outcome, seen = self._connection.recv()
                # A process that takes this one's place knows what this one has reached.
                if self._lines is not None:
                    self._lines.seen |= seen
                return outcome
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            self._process = None
            name = signal.Signals(-code).name if code < 0 else f"exit {code}"
            return Outcome(name, f"crash ({name})", "the process ended")
        self.close()
        return Outcome("time", "time", f"more than {self._seconds} s")

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None

    def _start(self) -> None:
        own, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=_serve, args=(theirs, own, self._lines, *self._arguments), daemon=True)
        with warnings.catch_warnings():
            # From Python 3.12 on, of threads in the parent. The child uses none of them.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process.start()
        theirs.close()
        self._connection = own
        # A loaded machine may take long to start it; inputs are timed from here on.
        own.recv()


class Lines:
    """Which lines of the package have been reached, of those that `sys.settrace` sees."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, int]] = set()
        self.new: set[tuple[str, int]] = set()
        self._left: dict[CodeType, int] = {}

    def start(self) -> None:
        """Counts from here on."""
        self.new = set()
        sys.settrace(self._enter)

    def stop(self) -> set[tuple[str, int]]:
        """The lines reached since [`start`] for the first time."""
        sys.settrace(None)
        return self.new

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE):
            return None
        if code not in self._left:
            self._left[code] = len({line for _, _, line in code.co_lines() if line is not None})
        # A function all of whose lines have been seen costs nothing more.
        return self._line if self._left[code] else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            place = frame.f_code.co_filename, frame.f_lineno
            if place not in self.seen:
                self.seen.add(place)
                self.new.add(place)
                self._left[frame.f_code] -= 1
        return self._line


def _serve(
    connection: Connection,
    other_end: Connection,
    lines: Lines | None,
    reader: Callable[[bytes], Any],
    allowed: tuple[type[BaseException], ...],
    naming: str | None,
    memory: int,
) -> None:
    other_end.close()
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)  # the parent's threads are not there any more
    faulthandler.disable()
    # What readers print or warn of is no finding, and natively printed stacks of errors are many.
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    warnings.simplefilter("ignore")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    connection.send("ready")
    while True:
        try:
            data = connection.recv_bytes()
        except EOFError:
            os._exit(0)
        if lines is not None:
            lines.start()
        outcome = _read(reader, data, allowed, naming)
        new = lines.stop() if lines is not None else set()
        connection.send((Outcome(outcome.raised, outcome.fault, outcome.detail, len(new)), new))


def _read(
    reader: Callable[[bytes], Any], data: bytes, allowed: tuple[type[BaseException], ...], naming: str | None
) -> Outcome:
    try:
        reader(data)
    except Exception as error:  # whatever a reader raises is what is looked for
        name = type(error).__name__
        documented = isinstance(error, allowed) and (not isinstance(error, RAW_ERRORS) or type(error) in allowed)
        if not documented:
            last = traceback.extract_tb(error.__traceback__)[-3:]
            places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(last))
            return Outcome(name, name, f"{str(error)[:300]} ({places})")
        if naming is not None and naming not in str(error):
            return Outcome(name, f"unnamed {name}", f"{str(error)[:300]}: does not name {naming!r}")
        return Outcome(name)
    return Outcome(None)
