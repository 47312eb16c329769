"""Many episodes: simulators in processes of their own beside one policy that answers all of them at once."""

import contextlib
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait

from hf_aegis.evaluation.rollouts.episodes import EpisodeResult, EpisodeSpec
from hf_aegis.evaluation.rollouts.policy import BatchedPolicy, PolicyRequest
from hf_aegis.evaluation.rollouts.worker import WorkerSetup, work


Task = tuple[str, str]

_POLL_SECONDS = 1.0
_CRASHES_IN_A_ROW = 5
"""So many for each environment, without one episode that ends, are no accidents."""


class RolloutError(OSError):
    """No episode comes to an end, whatever the policy does."""


def run_rollouts(
    specs: Sequence[EpisodeSpec],
    setup: WorkerSetup,
    policy: BatchedPolicy | None = None,
    num_envs: int = 1,
    hang_seconds: float = 600.0,
) -> Iterator[EpisodeResult]:
    """
    Runs episodes, several side by side, and yields each result when it is there.

    A simulator whose process dies, raises, or gives no sign of life for too long makes its episode a crashed one, and
    is replaced by another for the next episode. Results do not depend on how many run side by side, but for the
    rounding of a model whose batches differ.

    Args:
        specs (`Sequence[EpisodeSpec]`): The episodes.
        setup ([`WorkerSetup`]): What the workers do.
        policy ([`BatchedPolicy`], *optional*): Answers in this process; not needed where the workers' policy is local.
        num_envs (`int`, *optional*, defaults to `1`): Environments side by side, each in a process.
        hang_seconds (`float`, *optional*, defaults to `600`): How long a worker may keep silent.

    Raises:
        ImportError: If what the simulator needs is not installed.
        RolloutError: If episode after episode crashes.
        ValueError: If a number is out of range, or there is no policy.
    """
    if num_envs < 1 or hang_seconds <= 0:
        raise ValueError(f"num_envs and hang_seconds must be positive, found {num_envs} and {hang_seconds}")
    if setup.local_policy is None and policy is None:
        raise ValueError("the workers ask for actions, and there is no policy to answer")
    waiting = list(specs)
    workers = [_Worker(setup, hang_seconds) for _ in range(min(num_envs, len(waiting)))]
    crashes, most = 0, _CRASHES_IN_A_ROW * len(workers)
    try:
        while waiting or any(worker.spec is not None for worker in workers):
            for worker in workers:
                if worker.spec is None and waiting:
                    worker.begin(_take(waiting, worker.task, [other.task for other in workers if other.spec]))
            for result in _news(workers):
                crashes = crashes + 1 if result.success is None else 0
                yield result
                if crashes >= most:
                    raise RolloutError(f"{crashes} episodes crashed one after the other, the last: {result.error}")
            asking = [worker for worker in workers if worker.request is not None]
            if asking:
                assert policy is not None  # checked at the door
                answers = policy.act_together([worker.request for worker in asking if worker.request is not None])
                for worker, answer in zip(asking, answers, strict=True):
                    worker.answer(answer)
    finally:
        for worker in workers:
            worker.stop()


def _take(
    waiting: list[EpisodeSpec], own: tuple[str, str] | None, others: list[tuple[str, str] | None]
) -> EpisodeSpec:
    """The next episode for a worker: of the task whose environment it has, or of one that no other is at."""
    chosen = next((index for index, spec in enumerate(waiting) if (spec.suite, spec.task) == own), None)
    if chosen is None:
        chosen = next((index for index, spec in enumerate(waiting) if (spec.suite, spec.task) not in others), 0)
    return waiting.pop(chosen)


def _news(workers: Sequence["_Worker"]) -> list[EpisodeResult]:
    """Waits until some worker says something, or is overdue; the results among it."""
    at_work = [worker for worker in workers if worker.spec is not None and worker.request is None]
    ready = wait([worker.connection for worker in at_work if worker.connection], timeout=_POLL_SECONDS)
    results = []
    for worker in at_work:
        result = worker.listen() if worker.connection in ready else worker.overdue()
        if result is not None:
            results.append(result)
    return results


class _Worker:
    """One process with a simulator, as seen from here; the process is started with its first episode."""

    def __init__(self, setup: WorkerSetup, hang_seconds: float):
        self.setup = setup
        self.hang_seconds = hang_seconds
        self.connection: Connection | None = None
        self.spec: EpisodeSpec | None = None
        self.task: Task | None = None
        self.request: PolicyRequest | None = None
        self._heard = self._began = 0.0

    def begin(self, spec: EpisodeSpec) -> None:
        if self.connection is None or not self._process.is_alive():
            self._start()
        assert self.connection is not None
        self.spec, self.task = spec, (spec.suite, spec.task)
        self._heard = self._began = time.monotonic()
        # If it died between two episodes, `listen` finds the pipe closed.
        with contextlib.suppress(ConnectionError):
            self.connection.send(spec)

    def answer(self, actions: object) -> None:
        assert self.connection is not None
        self.request = None
        self._heard = time.monotonic()
        with contextlib.suppress(ConnectionError):
            self.connection.send(actions)

    def listen(self) -> EpisodeResult | None:
        assert self.connection is not None
        self._heard = time.monotonic()
        try:
            kind, *content = self.connection.recv()
        except (EOFError, OSError):
            self._process.join()
            return self._crash(f"the simulator's process ended with code {self._process.exitcode}")
        if kind == "unable":
            raise ImportError(content[0])
        if kind == "act":
            (self.request,) = content
        if kind != "done":
            return None
        self.spec = None
        return content[0]

    def overdue(self) -> EpisodeResult | None:
        if time.monotonic() - self._heard < self.hang_seconds:
            return None
        return self._crash(f"the simulator gave no sign of life for {self.hang_seconds:g} s")

    def stop(self) -> None:
        if self.connection is not None:
            self.connection.close()
            # Nothing that a simulator holds outlives its process.
            self._process.kill()
            self._process.join()
        self.connection = None

    def _start(self) -> None:
        # Forked, a process would share this one's threads' locks and OpenGL.
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self._process = context.Process(target=work, args=(other, self.setup), daemon=True)
        self._process.start()
        # Only with a single owner does the pipe close when the worker dies.
        other.close()

    def _crash(self, error: str) -> EpisodeResult:
        assert self.spec is not None
        result = EpisodeResult.crashed(self.spec, error, time.monotonic() - self._began)
        self.stop()
        self.spec = self.task = None
        return result
