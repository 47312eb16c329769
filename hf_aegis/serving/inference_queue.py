"""One policy for many clients: requests wait in line, and those that wait together are answered together."""

import asyncio
import logging
import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_aegis.evaluation.rollouts.policy import BatchedPolicy, PolicyError, PolicyRequest, checked_chunk


LEAVE_SECONDS = 3.0
"""How long a stopping server waits for the policy's last call."""

logger = logging.getLogger(__name__)


class InferenceError(RuntimeError):
    """The policy could not answer; the text is meant for the client."""


@dataclass(frozen=True)
class Answer:
    """
    What a policy answered.

    Args:
        actions (`np.ndarray` of shape `(H, 7)`): In the simulator's units.
        waited (`float`): Seconds between the question and the policy's turning to it.
        inferred (`float`): Seconds that the policy took.
        batch_size (`int`): How many questions it answered in that time.
    """

    actions: np.ndarray
    waited: float
    inferred: float
    batch_size: int


@dataclass(frozen=True)
class _Waiting:
    request: PolicyRequest
    answer: asyncio.Future[Answer]
    since: float


class InferenceQueue:
    """
    Asks a policy in a thread of its own, so that the event loop goes on answering pings while it computes.

    A call cannot be ended from outside. One that takes too long is taken for stuck: whoever waits for it or behind it
    is told, and who comes later is told at once, until it returns after all.

    Args:
        policy (`BatchedPolicy`): Is asked from one thread only, and never twice at a time.
        max_batch_size (`int`, *optional*, defaults to `8`): Questions that it is given at once.
        max_seconds (`float`, *optional*, defaults to `300`): After so long a call is taken for stuck.

    Attributes:
        stuck (`bool`): Whether the present call has taken too long.

    Raises:
        ValueError: If `max_batch_size` is below 1 or `max_seconds` not positive.
    """

    def __init__(self, policy: BatchedPolicy, max_batch_size: int = 8, max_seconds: float = 300.0):
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size must be at least 1; found {max_batch_size}")
        if not max_seconds > 0:
            raise ValueError(f"max_seconds must be positive; found {max_seconds}")
        self.policy = policy
        self.max_batch_size = max_batch_size
        self.max_seconds = max_seconds
        self.stuck = False
        self._waiting: asyncio.Queue[_Waiting] = asyncio.Queue()

    async def infer(self, request: PolicyRequest) -> Answer:
        """
        Waits in line, then for the policy. Cancelled while in line, the policy is not asked.

        Raises:
            InferenceError: If the policy cannot answer, or is stuck.
        """
        if self.stuck:
            raise self._stuck_error()
        waiting = _Waiting(request, asyncio.get_running_loop().create_future(), time.perf_counter())
        self._waiting.put_nowait(waiting)
        return await waiting.answer

    async def run(self) -> None:
        """Works until it is cancelled."""
        thread = _PolicyThread()
        try:
            while True:
                batch = [await self._waiting.get()]
                while len(batch) < self.max_batch_size and not self._waiting.empty():
                    batch.append(self._waiting.get_nowait())
                # Clients that are gone have cancelled their questions.
                batch = [waiting for waiting in batch if not waiting.answer.done()]
                if batch:
                    await self._answer(batch, thread)
        finally:
            thread.leave(LEAVE_SECONDS)

    async def _answer(self, batch: Sequence[_Waiting], thread: "_PolicyThread") -> None:
        began = time.perf_counter()
        requests = [waiting.request for waiting in batch]
        call = asyncio.wrap_future(thread.submit(lambda: self._ask(requests)))
        try:
            await asyncio.wait((call,), timeout=self.max_seconds)
            if not call.done():
                self._tell_stuck(batch)
                await asyncio.wait((call,))
                self.stuck = False
                logger.warning("the policy has come back after %.0f s", time.perf_counter() - began)
            results = call.result()
        finally:
            # Stopped meanwhile, its result is for nobody.
            call.cancel()
        took = time.perf_counter() - began
        for waiting, result in zip(batch, results, strict=True):
            if waiting.answer.done():
                continue
            if isinstance(result, Exception):
                waiting.answer.set_exception(result)
            else:
                waiting.answer.set_result(Answer(result, began - waiting.since, took, len(batch)))

    def _tell_stuck(self, batch: Sequence[_Waiting]) -> None:
        self.stuck = True
        logger.error("the policy has not come back for %g s; clients are told so until it does", self.max_seconds)
        in_line = [self._waiting.get_nowait() for _ in range(self._waiting.qsize())]
        for waiting in (*batch, *in_line):
            if not waiting.answer.done():
                waiting.answer.set_exception(self._stuck_error())

    def _stuck_error(self) -> InferenceError:
        return InferenceError(f"the policy has not come back from a call for {self.max_seconds:g} s or more")

    def _ask(self, requests: Sequence[PolicyRequest]) -> list[np.ndarray | InferenceError]:
        try:
            results = self.policy.act_together(requests)
            if len(results) != len(requests):
                raise RuntimeError(f"the policy gave {len(results)} answers to {len(requests)} questions")
            return [_told(result) if isinstance(result, PolicyError) else _checked(result) for result in results]
        # Whatever a policy raises, the server has other clients.
        except Exception as error:
            if len(requests) > 1:
                # One question must not spoil the others.
                return [result for request in requests for result in self._ask([request])]
            return [_told(error)]


class _PolicyThread:
    """
    One thread for all calls. An executor's would be waited for when the program ends, which a call that never returns
    would then not let it do.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="policy", daemon=True)
        self._thread.start()

    def submit(self, function: Callable[[], Any]) -> "Future[Any]":
        future: Future[Any] = Future()
        self._calls.put((function, future))
        return future

    def leave(self, seconds: float) -> None:
        """Ends the thread, unless it is in a call for longer than that."""
        self._calls.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            logger.warning("the policy has not come back from its last call, and is left behind")

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            function, future = call
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = function()
            # The event loop is to raise it.
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)


def _checked(actions: Any) -> np.ndarray | InferenceError:
    try:
        return checked_chunk(actions)
    except PolicyError as error:
        return _told(error)


def _told(error: Exception) -> InferenceError:
    if isinstance(error, ValueError):
        # Of a policy's input or output, in words for whoever asked.
        return InferenceError(f"the policy cannot answer: {error}")
    # An error's text may hold what a client sent, which is not for the log.
    where = "".join(traceback.format_tb(error.__traceback__))
    logger.error("the policy failed with %s, at\n%s", type(error).__name__, where)
    return InferenceError(f"the policy failed with {type(error).__name__}; the server's log says where")
