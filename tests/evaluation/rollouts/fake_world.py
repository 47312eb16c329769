"""A world on a line, in place of the simulator: imported by the workers' processes, so a module of its own."""

import os
import signal
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from hf_aegis.evaluation.rollouts.episodes import EpisodeSpec, episode_seed
from hf_aegis.evaluation.rollouts.policy import Observation, PolicyError, PolicyRequest


GOAL = 1.0


@dataclass(frozen=True)
class FakeWorld:
    """
    The hand stands at a place drawn by the seed and has to get beyond 1. `mishaps` says, by start, what goes wrong
    after the third step: `raise`, `hang` or `kill`; `log` is a file for what was begun, by which process.
    """

    mishaps: dict = field(default_factory=dict)
    step_seconds: float = 0.0
    log: str | None = None

    def open(self, spec):
        if self.mishaps.get("open") == "import":
            raise ImportError("the simulator is not installed")
        if self.mishaps.get("open") == "raise":
            raise ValueError("cannot be opened")
        return FakeEnvironment(self)

    def begin(self, environment, spec):
        environment.begin(spec)
        if self.log is not None:
            with Path(self.log).open("a") as file:
                file.write(f"{spec.task} {spec.start} {os.getpid()}\n")


class FakeEnvironment:
    def __init__(self, world):
        self.world = world
        self.rendered = []
        self.actions = []

    def begin(self, spec):
        self.place = float(np.random.default_rng(spec.seed).uniform(0.0, 0.1))
        self.mishap = self.world.mishaps.get(spec.start)
        self.steps = 0

    def close(self):
        pass

    def step(self, action):
        self.actions.append(action)
        self.steps += 1
        time.sleep(self.world.step_seconds)
        if self.steps > 3 and self.mishap is not None:
            if self.mishap == "raise":
                raise ValueError("the simulation is unstable")
            if self.mishap == "hang":
                time.sleep(600)
            os.kill(os.getpid(), signal.SIGKILL)
        self.place += 0.1 * float(action[0])
        return self.place > GOAL

    def proprioception(self):
        return {"joint_states": np.full(7, self.place), "gripper_states": np.zeros(2)}

    def render(self, camera, size=8):
        self.rendered.append(camera)
        return np.full((size, size, 3), int(255 * min(abs(self.place), 1.0)), np.uint8)


class Forwards:
    """Goes forward by noise that follows from seed and step; notes the sizes of its batches."""

    cameras = ("agentview_rgb",)

    def __init__(self, fail_at=None):
        self.batches = []
        self.fail_at = fail_at
        self.answered = 0

    def act_together(self, requests):
        self.batches.append(len(requests))
        self.answered += len(requests)
        if self.fail_at is not None and self.answered >= self.fail_at:
            raise KeyboardInterrupt
        return [self._chunk(request) for request in requests]

    def _chunk(self, request: PolicyRequest):
        if request.instruction == "confuse":
            return PolicyError("no number")
        generator = np.random.default_rng([request.seed, request.observation.step])
        chunk = np.zeros((6, 7))
        chunk[:, 0] = generator.uniform(0.2, 0.8, size=6) if request.instruction == "go" else 0.0
        return chunk


class Fixed:
    """A local policy that answers with given chunks, one after the other."""

    def __init__(self, *chunks, cameras=()):
        self.chunks = list(chunks)
        self.cameras = cameras
        self.seen: list[Observation] = []
        self.told = None

    def reset(self, instruction, seed=0):
        self.told = (instruction, seed)

    def act(self, observation):
        self.seen.append(observation)
        return self.chunks.pop(0)


def go(environment, demonstration):
    """A [`LocalPolicy`] that goes forward."""
    chunk = np.zeros((50, 7))
    chunk[:, 0] = 1.0
    policy = Fixed(*[chunk] * 50)
    return policy


def specs(count, task="ahead", instruction="go", max_steps=40, replan_steps=4, **more):
    """Episodes from the first so many starts."""
    return [
        replace(
            EpisodeSpec("line", task, instruction, start, 0, max_steps, replan_steps, **more),
            seed=episode_seed(7, "line", task, start),
        )
        for start in range(count)
    ]
