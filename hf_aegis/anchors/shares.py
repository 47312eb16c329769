"""Processes that collect one anchor together, each from its share of the batches."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, distributed


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """
    Which of all batches a process has: number `rank`, `rank + size`, `rank + 2 size`, …; by default all.

    Args:
        rank (`int`, *optional*, defaults to 0): Of the process among those that share the batches.
        size (`int`, *optional*, defaults to 1): How many of them there are.
        process_group (`torch.distributed.ProcessGroup`, *optional*): They; needed where there are several.
    """

    rank: int = 0
    size: int = 1
    process_group: "ProcessGroup | None" = None

    @classmethod
    def of(cls, process_group: "ProcessGroup | None") -> "Share":
        """This process's share of what a group collects; of what it collects alone, without a group."""
        if process_group is None:
            return cls()
        return cls(distributed.get_rank(process_group), distributed.get_world_size(process_group), process_group)

    def number(self, index: int) -> int:
        """Which of all batches the process's `index`-th is."""
        return self.rank + index * self.size

    def sum_(self, total: Tensor) -> None:
        """Adds up what all processes have, in place."""
        if self.size > 1:
            distributed.all_reduce(total, group=self.process_group)

    def gathered(self, value: T) -> list[T]:
        """What each process has, in their order. Values travel pickled, between processes that trust each other."""
        if self.size == 1:
            return [value]
        everyone: list[Any] = [None] * self.size
        distributed.all_gather_object(everyone, value, group=self.process_group)
        return everyone

    def from_first(self, make: Callable[[], T]) -> T:
        """
        What the first process makes; the others wait for it and make nothing. It travels as in `gathered`.

        Raises:
            Exception: What `make` raises, in the first process; in the others a `ValueError` that quotes it if it is
                one, else a `RuntimeError`.
        """
        if self.size == 1:
            return make()
        raised: Exception | None = None
        # What was made; or the error's kind and its words, as not every error can be pickled.
        made: list[Any] = [None, None, None]
        if self.rank == 0:
            try:
                made[0] = make()
            except Exception as error:
                raised = error
                kind = ValueError if isinstance(error, ValueError) else RuntimeError
                quoted = str(error) if kind is ValueError else f"{type(error).__name__} in the first process: {error}"
                made[1:] = [kind, quoted]
        source = distributed.get_global_rank(self.process_group, 0)  # type: ignore[arg-type]
        distributed.broadcast_object_list(made, src=source, group=self.process_group)
        if raised is not None:
            raise raised
        if made[1] is not None:
            raise made[1](made[2])
        return made[0]
