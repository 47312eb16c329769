"""Hooks on modules that go when a block ends."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def removed_afterwards(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Removes the hooks of `handles` when the block ends, whatever happens in it."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield
