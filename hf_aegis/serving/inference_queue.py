"""One policy for many clients: requests wait in line, and those that wait together are answered together."""

import asyncio
import logging
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from hf_aegis.evaluation.rollouts.policy import BatchedPolicy, PolicyError, PolicyRequest


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

    Args:
        policy (`BatchedPolicy`): Is asked from one thread only, and never twice at a time.
        max_batch_size (`int`, *optional*, defaults to `8`): Questions that it is given at once.

    Raises:
        ValueError: If `max_batch_size` is below 1.
    """

    def __init__(self, policy: BatchedPolicy, max_batch_size: int = 8):
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size must be at least 1; found {max_batch_size}")
        self.policy = policy
        self.max_batch_size = max_batch_size
        self._waiting: asyncio.Queue[_Waiting] = asyncio.Queue()

    async def infer(self, request: PolicyRequest) -> Answer:
        """
        Waits in line, then for the policy. Cancelled while in line, the policy is not asked.

        Raises:
            InferenceError: If the policy cannot answer.
        """
        waiting = _Waiting(request, asyncio.get_running_loop().create_future(), time.perf_counter())
        self._waiting.put_nowait(waiting)
        return await waiting.answer

    async def run(self) -> None:
        """Works until it is cancelled."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="policy") as thread:
            while True:
                batch = [await self._waiting.get()]
                while len(batch) < self.max_batch_size and not self._waiting.empty():
                    batch.append(self._waiting.get_nowait())
                # Clients that are gone have cancelled their questions.
                batch = [waiting for waiting in batch if not waiting.answer.done()]
                if batch:
                    await self._answer(batch, thread)

    async def _answer(self, batch: Sequence[_Waiting], thread: ThreadPoolExecutor) -> None:
        began = time.perf_counter()
        requests = [waiting.request for waiting in batch]
        results = await asyncio.get_running_loop().run_in_executor(thread, self._ask, requests)
        took = time.perf_counter() - began
        for waiting, result in zip(batch, results, strict=True):
            if waiting.answer.done():
                continue
            if isinstance(result, Exception):
                waiting.answer.set_exception(result)
            else:
                waiting.answer.set_result(Answer(result, began - waiting.since, took, len(batch)))

    def _ask(self, requests: Sequence[PolicyRequest]) -> list[np.ndarray | InferenceError]:
        try:
            results = self.policy.act_together(requests)
            if len(results) != len(requests):
                raise RuntimeError(f"the policy gave {len(results)} answers to {len(requests)} questions")
        # Whatever a policy raises, the server has other clients.
        except Exception as error:
            if len(requests) > 1:
                # One question must not spoil the others.
                return [result for request in requests for result in self._ask([request])]
            return [_told(error)]
        return [_told(result) if isinstance(result, PolicyError) else np.asarray(result) for result in results]


def _told(error: Exception) -> InferenceError:
    if isinstance(error, ValueError):
        # Of a policy's input or output, in words for whoever asked.
        return InferenceError(f"the policy cannot answer: {error}")
    # An error's text may hold what a client sent, which is not for the log.
    where = "".join(traceback.format_tb(error.__traceback__))
    logger.error("the policy failed with %s, at\n%s", type(error).__name__, where)
    return InferenceError(f"the policy failed with {type(error).__name__}; the server's log says where")
