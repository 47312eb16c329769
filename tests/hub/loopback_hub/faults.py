"""Requests that fail: an answer of the test's choice, a connection that breaks, or a download that stops half-way."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass
class Fault:
    method: str | None
    path: str
    kind: Literal["status", "drop", "cut", "change"]
    status: int
    message: str
    after: int
    times: int
    change: Callable[[Any], Any]


class Faults:
    """Faults that are still to come."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def add(
        self,
        kind: Literal["status", "drop", "cut", "change"] = "status",
        *,
        method: str | None = None,
        path: str = "",
        status: int = 500,
        message: str = "Internal Error - we're working hard to fix this as soon as possible!",
        after: int = 0,
        times: int = 1,
        change: Callable[[Any], Any] = lambda answer: answer,
    ) -> None:
        """
        Makes requests fail.

        Args:
            kind: `"status"` answers with an error, `"drop"` breaks the connection, `"cut"` sends half of the body,
                `"change"` sends what `change` makes of the answer.
            method: Only these requests, e.g. `"POST"`.
            path: Only those whose path contains this, e.g. `"/commit/"`.
            status: The answer's.
            message: What the answer says.
            after: Number of such requests that pass first.
            times: Number of requests that fail.
            change: Gives another answer in the place of one.
        """
        self._faults.append(Fault(method, path, kind, status, message, after, times, change))

    def clear(self) -> None:
        """No more faults."""
        with self._lock:
            self._faults.clear()

    def take(self, method: str, path: str) -> Fault | None:
        """The fault that a request meets, if any."""
        with self._lock:
            for fault in self._faults:
                if fault.times < 1 or fault.path not in path or fault.method not in (None, method):
                    continue
                if fault.after > 0:
                    fault.after -= 1
                    continue
                fault.times -= 1
                return fault
        return None
