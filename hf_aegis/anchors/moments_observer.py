"""Forward hooks that reduce the decoder layers' outputs to their moments."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from hf_aegis.functional.moments import check_mask, token_moments
from hf_aegis.hooks import removed_afterwards


class MomentsObserver:
    """
    Forward hooks that reduce each layer's output to its moments over the tokens that count, on the layer's own device.

    Args:
        layers (`nn.ModuleList`):
            The decoder layers.
    """

    def __init__(self, layers: nn.ModuleList):
        self.layers = layers
        self.num_samples = 0
        self._shape: torch.Size | None = None
        self._rows: Tensor | None = None
        self._moments: dict[int, tuple[Tensor, Tensor]] = {}
        self._num_tokens = 0

    def attached(self) -> AbstractContextManager[None]:
        """Keeps the hooks on the layers for the duration of the block, whatever happens in it."""
        return removed_afterwards(
            layer.register_forward_hook(lambda _layer, _inputs, output, index=index: self._observe(index, output))
            for index, layer in enumerate(self.layers)
        )

    def start_batch(self, mask: Tensor | None) -> None:
        """Forgets the last batch; `mask` `(B, T)` is the next one's."""
        self._moments.clear()
        self._shape = None if mask is None else mask.shape
        # Once for all layers: which tokens count, unless it is all of them. The layers then wait for nothing.
        rows = None if mask is None else mask.flatten().nonzero()[:, 0]
        self._rows = None if mask is None or rows is None or len(rows) == mask.numel() else rows

    def _observe(self, index: int, output: Tensor | tuple[Tensor, ...]) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if index in self._moments:
            raise ValueError(f"decoder layer {index} ran twice in one forward pass: its moments would be ambiguous")
        if self._shape is not None and self._shape != hidden.shape[:-1]:
            raise ValueError(
                f"attention_mask has shape {tuple(self._shape)}, but decoder layer {index} works on "
                f"{tuple(hidden.shape[:-1])} (batch, tokens): the batch's attention_mask must have one entry per token"
            )
        check_mask(hidden, None)
        self.num_samples = hidden.shape[0]
        tokens = hidden.flatten(0, 1)
        if self._rows is not None:
            # What the others hold, NaN included, has no influence.
            tokens = tokens.index_select(0, self._rows.to(tokens.device))
        self._num_tokens = len(tokens)
        self._moments[index] = token_moments(tokens)

    def batch_moments(self, batch_index: int) -> tuple[Tensor, Tensor, int]:
        """
        What the hooks saw since [`~MomentsObserver.start_batch`].

        Returns:
            `tuple[Tensor, Tensor, int]`: mean `(L, D)` and variance `(L, D)` as float64 on the CPU, and the number of
            tokens.

        Raises:
            ValueError: if a layer did not run, no token counted, or a statistic is not finite.
        """
        silent = [index for index in range(len(self.layers)) if index not in self._moments]
        if silent:
            raise ValueError(f"batch {batch_index}: decoder layers {silent} did not run in the forward pass")
        if self._num_tokens == 0:
            raise ValueError(
                f"batch {batch_index}: the attention mask leaves no token to count, or none of the chosen kind"
            )
        # One transfer per layer and batch, here and not in the hooks, where it would stall the forward pass.
        rows = torch.stack([torch.stack(self._moments[index]).cpu().double() for index in range(len(self.layers))])
        finite = torch.isfinite(rows).all(dim=-1)
        if not bool(finite.all()):
            layer, row = (int(value) for value in torch.nonzero(~finite)[0])
            statistic = ("mean", "variance")[row]
            raise ValueError(f"batch {batch_index}: decoder layer {layer} has a {statistic} that is not finite")
        return rows[:, 0], rows[:, 1], self._num_tokens
