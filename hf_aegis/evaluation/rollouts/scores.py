"""Success rates of episodes, by task and suite."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from hf_aegis.evaluation.rollouts.episodes import EpisodeResult
from hf_aegis.functional.wilson import wilson_interval


@dataclass(frozen=True)
class RolloutScore:
    """
    How often a policy succeeded.

    A crashed episode says nothing of the policy: it is counted, and the rate is over the others.

    Args:
        episodes (`int`): Those that came to an end.
        successes (`int`): How many of them succeeded.
        crashed (`int`): Episodes beside them that crashed.
        faults (`int`): How many of those that failed did so because the policy's answer could not be executed.
        success_rate (`float`, *optional*): `successes / episodes`; `None` without an episode.
        interval (`tuple[float, float]`, *optional*): The rate's 95 % interval, Wilson's.
        mean_steps (`float`, *optional*): Of the successful episodes.
    """

    episodes: int
    successes: int
    crashed: int
    faults: int
    success_rate: float | None
    interval: tuple[float, float] | None
    mean_steps: float | None

    @classmethod
    def of(cls, results: Iterable[EpisodeResult]) -> "RolloutScore":
        """The score of some episodes."""
        everything = list(results)
        ended = [result for result in everything if result.success is not None]
        steps = [result.steps for result in ended if result.success]
        return cls(
            episodes=len(ended),
            successes=len(steps),
            crashed=len(everything) - len(ended),
            faults=sum(result.error is not None for result in ended),
            success_rate=len(steps) / len(ended) if ended else None,
            interval=wilson_interval(len(steps), len(ended)) if ended else None,
            mean_steps=sum(steps) / len(steps) if steps else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "interval": None if self.interval is None else list(self.interval)}


def scores_by(results: Iterable[EpisodeResult], *fields: str) -> dict[str, RolloutScore]:
    """The scores of episodes that have the same `fields`, such as suite and task, by their values joined by `/`."""
    groups: dict[str, list[EpisodeResult]] = {}
    for result in results:
        groups.setdefault("/".join(str(getattr(result, field)) for field in fields), []).append(result)
    return {name: RolloutScore.of(group) for name, group in groups.items()}
