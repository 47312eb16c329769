"""Passes over the batches that an anchor is collected from."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from tqdm.auto import tqdm

from hf_aegis.anchors.partial_collection import PartialCollection, Resumable
from hf_aegis.anchors.shares import Share


@runtime_checkable
class SkippableBatches(Protocol):
    """Batches of which some can be left out without being made."""

    def starting_at(self, first: int) -> Iterator[Mapping[str, Any]]:
        """All but the `first` first ones."""


@dataclass(frozen=True)
class Passes:
    """
    How a process goes over its batches, once or several times.

    Args:
        num_batches (`int`, *optional*): How many it takes; all by default.
        progress (`bool`, *optional*, defaults to `True`): Shows progress bars.
        share ([`Share`], *optional*): Which of all batches they are; all by default.
        partial ([`PartialCollection`], *optional*): Where sums are kept from which a killed collection goes on.

    Raises:
        ValueError: if `num_batches` is below 1.
    """

    num_batches: int | None = None
    progress: bool = True
    share: Share = field(default_factory=Share)
    partial: PartialCollection | None = None

    def __post_init__(self) -> None:
        if self.num_batches is not None and self.num_batches < 1:
            raise ValueError(f"num_batches must be at least 1, found {self.num_batches}")

    def over(
        self, batches: Iterable[Mapping[str, Any]], name: str, sums: Resumable
    ) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """
        One pass. Batches that restored sums are of already are left out.

        Args:
            batches (`Iterable[Mapping[str, Any]]`): Of this process.
            name (`str`): Of the pass; `sums` are saved under it.
            sums ([`Resumable`]): Are to hold what was yielded before when the next batch is asked for.

        Yields:
            `tuple[int, Mapping[str, Any]]`: the batch's number among those of all processes, and the batch.

        Raises:
            ValueError: if there are fewer batches than there have to be, or none.
        """
        first = done = 0 if self.partial is None else self.partial.begin(name, sums)
        bar = tqdm(
            _taken(batches, first, self.num_batches),
            desc=f"Collecting {name.replace('_', ' ')}",
            total=self.num_batches or (len(batches) if isinstance(batches, Sized) else None),
            initial=first,
            unit="batch",
            disable=not self.progress,
        )
        for batch in bar:
            yield self.share.number(done), batch
            done += 1
            if self.partial is not None:
                self.partial.batch_done(name, done, sums)
        if done == 0:
            raise ValueError("no batches to collect an anchor from: the iterable is empty")
        if self.num_batches is not None and done < self.num_batches:
            raise ValueError(f"num_batches={self.num_batches}, but the iterable ended after {done} batches")
        if self.partial is not None and done > first:
            self.partial.pass_done(name, done, sums)


def _taken(batches: Iterable[Mapping[str, Any]], first: int, number: int | None) -> Iterator[Mapping[str, Any]]:
    """The batches from `first` on, up to `number` of all."""
    if isinstance(batches, SkippableBatches):
        return itertools.islice(batches.starting_at(first), None if number is None else max(number - first, 0))
    return itertools.islice(batches, first, number if number is None else max(number, first))
