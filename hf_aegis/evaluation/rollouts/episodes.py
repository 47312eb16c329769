"""One episode: what it is to be, how it is run, and what came of it."""

import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hf_aegis.evaluation.rollouts.film import Film
from hf_aegis.evaluation.rollouts.policy import Observation, Policy, PolicyError, checked_chunk
from hf_aegis.json_files import require_keys
from hf_aegis.simulation.libero_environment import SIMULATOR_CAMERAS


_BEAT_STEPS = 10
"""A sign of life is given this often."""

_STORED: dict[str, tuple[type, ...]] = {
    **{"suite": (str,), "task": (str,), "start": (int,), "seed": (int,), "success": (bool, type(None))},
    **{"steps": (int,), "wall_s": (float,), "error": (str, type(None)), "seconds": (dict,)},
}


@dataclass(frozen=True)
class EpisodeSpec:
    """
    An episode to run; equal ones give equal episodes.

    Args:
        suite (`str`): Of the task.
        task (`str`): The task's name.
        instruction (`str`): What the policy is told.
        start (`int`): Number of the fixed initial state, or of the demonstration that is replayed.
        seed (`int`): Of fixtures' poses, and of what the policy draws.
        max_steps (`int`): Actions after which the episode has failed.
        replan_steps (`int`): Actions of a chunk that are executed before the policy looks again.
        demonstration (`tuple[str, str]`, *optional*):
            File and HDF5 path of a demonstration, whose recorded state is the start in place of a fixed one.
        film (`str`, *optional*): File to film the episode to.
    """

    suite: str
    task: str
    instruction: str
    start: int
    seed: int
    max_steps: int
    replan_steps: int
    demonstration: tuple[str, str] | None = None
    film: str | None = None

    @property
    def key(self) -> tuple[str, str, int]:
        """What tells episodes of one evaluation apart."""
        return self.suite, self.task, self.start


@dataclass(frozen=True)
class EpisodeResult:
    """
    What came of an episode.

    Args:
        suite, task, start, seed: Of its [`EpisodeSpec`].
        success (`bool`, *optional*):
            Whether the task's goal held within the allowed steps; `None` for an episode that crashed, which says
            nothing of the policy.
        steps (`int`): Actions executed.
        wall_s (`float`): Seconds it took.
        error (`str`, *optional*): Why it crashed, or what was wrong with the policy's answer that ended it.
        seconds (`dict[str, float]`, *optional*):
            Where they went: `reset` (settling included), `physics`, `rendering`, `policy` (waiting for other episodes'
            turns included), `film`.
    """

    suite: str
    task: str
    start: int
    seed: int
    success: bool | None
    steps: int
    wall_s: float
    error: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def crashed(cls, spec: EpisodeSpec, error: str, wall_s: float) -> "EpisodeResult":
        """The result of an episode that the machinery, not the policy, brought to an end."""
        return cls(spec.suite, spec.task, spec.start, spec.seed, None, 0, round(wall_s, 3), error)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "EpisodeResult":
        """
        Inverse of `to_dict`; further keys are passed over.

        Raises:
            ValueError: If a key is missing or its value of another type.
        """
        if missing := [name for name in _STORED if name not in values and name not in ("error", "seconds")]:
            raise ValueError(f"keys {missing} are missing")
        values = {"seconds": {}, **values}
        require_keys(values, _STORED, "the episode")
        require_keys(values["seconds"], dict.fromkeys(values["seconds"], (float,)), "the episode, key 'seconds'")
        return cls(**{name: values[name] for name in _STORED if name in values})

    @property
    def key(self) -> tuple[str, str, int]:
        """What tells episodes of one evaluation apart."""
        return self.suite, self.task, self.start

    @property
    def outcome(self) -> str:
        """`"success"`, `"failure"` or `"crash"`."""
        return "crash" if self.success is None else "success" if self.success else "failure"

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def episode_seed(seed: int, suite: str, task: str, start: int) -> int:
    """The seed of one episode of an evaluation, whatever other episodes it has."""
    key = zlib.crc32(f"{suite}/{task}".encode())
    return int(np.random.SeedSequence([seed, key, start]).generate_state(1)[0] >> 1)


def run_episode(
    environment: Any,
    policy: Policy,
    spec: EpisodeSpec,
    begin: Callable[[Any, EpisodeSpec], None],
    beat: Callable[[], None] = lambda: None,
) -> EpisodeResult:
    """
    Lets a policy act from the start to success, the step limit, or its own end.

    Args:
        environment ([`~simulation.LiberoEnvironment`]): Of the task.
        policy ([`Policy`]): Acts; images are rendered when it looks, and of its cameras only.
        spec ([`EpisodeSpec`]): The episode.
        begin (`Callable`): Brings the environment to the start.
        beat (`Callable`, *optional*): Called now and then, as a sign of life.
    """
    clock = _Clock()
    film = Film(spec.instruction) if spec.film is not None else None
    steps, success, error = 0, False, None
    with clock("reset"):
        begin(environment, spec)
        policy.reset(spec.instruction, spec.seed)
    beat()
    while steps < spec.max_steps and not success:
        with clock("rendering"):
            images = {name: environment.render(SIMULATOR_CAMERAS[name]) for name in policy.cameras}
        try:
            with clock("policy"):
                chunk = checked_chunk(policy.act(Observation(images, environment.proprioception(), steps)))
        except PolicyError as fault:
            error = f"policy: {fault}"
            break
        if len(chunk) == 0:
            break
        for action in chunk[: min(spec.replan_steps, spec.max_steps - steps)]:
            if film is not None and film.due(steps):
                with clock("film"):
                    film.add(environment, steps)
            with clock("physics"):
                success = environment.step(action)
            steps += 1
            if steps % _BEAT_STEPS == 0:
                beat()
            if success:
                break
    if film is not None and spec.film is not None:
        with clock("film"):
            film.add(environment, steps)
            film.save(Path(spec.film), "success" if success else "failure")
    return EpisodeResult(
        *spec.key, spec.seed, success, steps, round(clock.total(), 3), error, clock.seconds()
    )  # fmt: skip


class _Clock:
    """Where an episode's time goes."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._spent: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._spent[name] = self._spent.get(name, 0.0) + time.perf_counter() - began

    def total(self) -> float:
        return time.perf_counter() - self._began

    def seconds(self) -> dict[str, float]:
        return {name: round(value, 3) for name, value in self._spent.items()}
