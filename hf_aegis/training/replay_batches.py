"""Batches of replayed samples, each a pure function of its number, so that a resumed run replays the same ones."""

from collections.abc import Callable
from typing import Any

import numpy as np


class ReplayBatches:
    """
    Whole batches of a dataset, shuffled anew for each pass over it.

    Args:
        dataset (`Sequence`): The samples.
        collator (`Callable`): From a list of samples to a batch.
        batch_size (`int`): Samples per batch.
        seed (`int`): Of the orders.
        rank, size (`int`, *optional*, defaults to `0` and `1`):
            Of how many processes this is which: a batch is spread over them, `batch_size` samples each.

    Raises:
        ValueError: If there are fewer samples than a batch holds.
    """

    def __init__(
        self,
        dataset: Any,
        collator: Callable[[list[Any]], Any],
        batch_size: int,
        seed: int,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        if len(dataset) < batch_size * size:
            raise ValueError(f"replay_dataset has {len(dataset)} samples, fewer than a batch of {batch_size * size}")
        self.dataset = dataset
        self.collator = collator
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.size = size
        self._epoch = -1
        self._order = np.empty(0, dtype=int)

    def __getitem__(self, number: int) -> Any:
        """Batch `number`, counted from zero without end."""
        epoch, position = divmod(number, len(self.dataset) // (self.batch_size * self.size))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))
        start = (position * self.size + self.rank) * self.batch_size
        chosen = self._order[start : start + self.batch_size]
        return self.collator([self.dataset[index] for index in chosen.tolist()])
