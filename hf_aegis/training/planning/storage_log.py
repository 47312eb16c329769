"""When the memory of tensors comes and goes, and what it holds."""

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


TEMPORARY = "temporary"


@dataclass(frozen=True)
class Peak:
    """
    The moment at which most memory was held.

    Attributes:
        phase (`str`): The phase it was in.
        bytes (`int`): What was held then.
        items (`dict[str, int]`): The same by kind, the largest first.
    """

    phase: str
    bytes: int
    items: dict[str, int] = field(default_factory=dict)


class StorageLog(TorchDispatchMode):
    """
    A context that notes every storage of a tensor made in it, from its first operation until it is freed.

    Tensors may be real or fake; their sizes are all that is read. What an operation takes for itself while it runs
    (workspaces of matrix products, buffers of a reduction) is not seen. Kinds are given afterwards, by [`tag`], so
    that one moment's memory can be told apart by what became of it later: an activation that is kept for the backward
    pass, or one that is gone before.

    Args:
        granule (`int`, *optional*, defaults to 1): Sizes are rounded up to its multiples, as an allocator does.
    """

    def __init__(self, granule: int = 1) -> None:
        super().__init__()
        self.granule = granule
        self._phase = ""
        # (phase, number of the storage, bytes); negative where it is freed.
        self._events: list[tuple[str, int, int]] = []
        self._kinds: list[str | None] = []
        self._numbers: dict[int, int] = {}
        self._references: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.note(output)
        return output

    def note(self, output: Any) -> None:
        """Notes the storages of what an operation gave."""
        for value in tree_iter(output):
            if isinstance(value, Tensor):
                self._note(value)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens in the block belongs to phase `name`."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    def tag(self, tensors: Iterable[Tensor | None], kind: str) -> None:
        """Says what the tensors' storages hold, for all of their time."""
        for tensor in tensors:
            if tensor is not None:
                self._note(tensor)
                self._kinds[self._numbers[id(tensor.untyped_storage())]] = kind

    def tag_live(self, kind: str, phase: str) -> None:
        """Says the same of all that came in a phase, is there still and has no kind."""
        came = {number for in_phase, number, size in self._events if in_phase == phase and size >= 0}
        for number in came & set(self._numbers.values()):
            self._kinds[number] = self._kinds[number] or kind

    def peak(self, phase: str | None = None) -> Peak | None:
        """The moment of most memory, of a phase or of all; `None` if nothing happened in it."""
        held = most = 0
        at = None
        for index, (in_phase, _, size) in enumerate(self._events):
            held += size
            if (phase is None or in_phase == phase) and (at is None or held > most):
                most, at = held, index
        if at is None:
            return None
        items: Counter[str] = Counter()
        for _, number, size in self._events[: at + 1]:
            items[self._kinds[number] or TEMPORARY] += size
        return Peak(self._events[at][0], most, {kind: size for kind, size in items.most_common() if size})

    def held(self, phase: str) -> np.ndarray:
        """Bytes held after each storage of a phase that came or went, `(events,)`."""
        totals = np.cumsum([size for _, _, size in self._events], dtype=np.int64)
        return totals[np.array([in_phase == phase for in_phase, _, _ in self._events], dtype=bool)]

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._numbers:
            return
        number, size = len(self._kinds), -(-storage.nbytes() // self.granule) * self.granule
        self._kinds.append(None)
        self._numbers[key] = number
        self._events.append((self._phase, number, size))
        self._references[key] = weakref.ref(storage, lambda _: self._free(key, number, size))

    def _free(self, key: int, number: int, size: int) -> None:
        del self._numbers[key], self._references[key]
        self._events.append((self._phase, number, -size))
