"""
The process that owns a simulator: it is given episodes, runs them, and asks the policy over a pipe where that one is
elsewhere.

What it says: `("act", PolicyRequest)`, answered by a chunk or a [`PolicyError`]; `("alive",)`, a sign of life;
`("done", EpisodeResult)`; `("unable", text)` where no episode can be run here, because something is not installed.
"""

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any, Literal

import numpy as np

from hf_aegis.evaluation.rollouts.episodes import EpisodeResult, EpisodeSpec, run_episode
from hf_aegis.evaluation.rollouts.policy import Observation, Policy, PolicyError, PolicyRequest
from hf_aegis.evaluation.rollouts.simulator_policies import LocalPolicy, recorded_start


@dataclass(frozen=True)
class LiberoWorld:
    """
    How episodes of LIBERO begin, and in which pictures.

    Args:
        image_size, supersampling, rendering: As of [`~simulation.LiberoEnvironment`].
    """

    image_size: int = 128
    supersampling: int = 1
    rendering: Literal["fast", "standard"] = "fast"

    def open(self, spec: EpisodeSpec) -> Any:
        """The environment of an episode's task."""
        from hf_aegis.simulation.libero_environment import LiberoEnvironment
        from hf_aegis.simulation.libero_tasks import find_task

        task = find_task(spec.suite, spec.task)
        return LiberoEnvironment(task, self.image_size, self.supersampling, self.rendering)

    def begin(self, environment: Any, spec: EpisodeSpec) -> None:
        """Brings it to the episode's start."""
        if spec.demonstration is None:
            environment.reset(init_state=spec.start, seed=spec.seed)
        else:
            start = recorded_start(*spec.demonstration)
            environment.restore(start.state, seed=start.seed)


@dataclass(frozen=True)
class WorkerSetup:
    """
    What a worker is to do with the episodes it is given.

    Args:
        world ([`LiberoWorld`]): Opens environments and brings them to a start; anything with its two methods.
        local_policy ([`LocalPolicy`], *optional*): Makes the policy that acts here; without one, actions are asked
            for over the pipe.
        cameras (`Sequence[str]`, *optional*): The images that a policy which is elsewhere looks at.
    """

    world: Any
    local_policy: LocalPolicy | None = None
    cameras: Sequence[str] = ()


class _PolicyElsewhere:
    def __init__(self, connection: Connection, cameras: Sequence[str]):
        self.cameras = cameras
        self._connection = connection

    def reset(self, instruction: str, seed: int = 0) -> None:
        self._instruction, self._seed = instruction, seed

    def act(self, observation: Observation) -> np.ndarray:
        self._connection.send(("act", PolicyRequest(self._instruction, observation, self._seed)))
        answer = self._connection.recv()
        if isinstance(answer, PolicyError):
            raise answer
        return answer


def work(connection: Connection, setup: WorkerSetup) -> None:
    """The worker's life: episodes from the pipe until it closes."""
    # An interruption is the main process's to handle: it closes the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    owner = _EnvironmentOwner(setup.world)
    try:
        while True:
            spec: EpisodeSpec = connection.recv()
            connection.send(("done", _attempt(owner, setup, spec, connection)))
    except ImportError as error:
        connection.send(("unable", str(error)))
    except (EOFError, ConnectionError):
        pass
    finally:
        owner.close()


def _end_with_parent() -> None:
    """A simulator that hangs would never find the pipe closed by a main process that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _attempt(
    owner: "_EnvironmentOwner", setup: WorkerSetup, spec: EpisodeSpec, connection: Connection
) -> EpisodeResult:
    began = time.perf_counter()

    def beat() -> None:
        connection.send(("alive",))

    try:
        environment = owner.environment(spec)
        built = time.perf_counter() - began
        policy: Policy = (
            _PolicyElsewhere(connection, setup.cameras)
            if setup.local_policy is None
            else setup.local_policy(environment, spec.demonstration)
        )
        result = run_episode(environment, policy, spec, setup.world.begin, beat)
        return replace(result, seconds={"building": round(built, 3), **result.seconds})
    except (ImportError, EOFError, ConnectionError):
        raise
    except Exception as error:
        # Whatever went wrong in a simulator must not end an evaluation of hours; it is told, and the next episode gets
        # another simulator.
        owner.close()
        text = "".join(traceback.format_exception_only(error)).strip()
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{os.path.basename(last.filename)}, line {last.lineno}"
        return EpisodeResult.crashed(spec, f"{text} ({where})", time.perf_counter() - began)


class _EnvironmentOwner:
    """One environment at a time: building one takes seconds, a soft reset a fraction of one."""

    def __init__(self, world: Any):
        self._world = world
        self._task: tuple[str, str] | None = None
        self._environment: Any = None

    def environment(self, spec: EpisodeSpec) -> Any:
        if self._task != (spec.suite, spec.task):
            self.close()
            self._environment = self._world.open(spec)
            self._task = (spec.suite, spec.task)
        return self._environment

    def close(self) -> None:
        environment, self._environment, self._task = self._environment, None, None
        if environment is not None:
            environment.close()
