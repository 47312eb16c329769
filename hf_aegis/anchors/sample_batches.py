"""Batches of a map-style data set that several processes share, and that a resumed pass need not make again."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from torch.utils.data import DataLoader

from hf_aegis.anchors.shares import Share


class Samples(Protocol):
    """A map-style data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class SampleBatches:
    """
    Batches of a map-style data set in its own order, or one process's share of them: whole batches, so that all
    processes together have the batches that one would have.

    Args:
        samples (a map-style data set): Has a length and items.
        batch_size (`int`): Samples in a batch; the last one may have fewer.
        collate (`Callable`): From a list of samples to a model's forward arguments.
        share ([`Share`], *optional*): Of the process; all batches by default.
        num_workers (`int`, *optional*, defaults to 0): Processes that prepare batches while the model runs.
        pin_memory (`bool`, *optional*, defaults to `False`): As of `torch.utils.data.DataLoader`.

    Raises:
        ValueError: if there are fewer batches than processes.
    """

    def __init__(
        self,
        samples: Samples,
        batch_size: int,
        collate: Callable[[list[Any]], Mapping[str, Any]],
        *,
        share: Share | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
    ):
        share = share or Share()
        starts = range(0, len(samples), batch_size)
        if len(starts) < share.size:
            raise ValueError(
                f"{len(samples)} samples in batches of {batch_size} are {len(starts)} batches, fewer than "
                f"{share.size} processes: some would have nothing to do"
            )
        self._samples, self._collate = samples, collate
        self._rows = [
            list(range(start, min(start + batch_size, len(samples)))) for start in starts[share.rank :: share.size]
        ]
        self._loading: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin_memory}

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return self.starting_at(0)

    def starting_at(self, first: int) -> Iterator[Mapping[str, Any]]:
        """All but the `first` first ones, whose samples are not read."""
        rows = self._rows[first:]
        loader: DataLoader[Any] = DataLoader(
            self._samples,  # type: ignore[arg-type]
            batch_sampler=rows,
            collate_fn=self._collate,
            **self._loading,
        )
        return iter(loader)
