"""Runs decoder layers on two parts of a batch one after the other, so that each has an autograd graph of its own."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_aegis.gradients.forward_pass import hidden_output


class RowSplit:
    """
    Replaces layers' forward by two calls, of a batch's first rows and of the others, whose outputs it joins.

    That is right where layers treat each row by itself and write no cache. The sums differ from those of one call by
    rounding only.

    Args:
        share (`float`): The share of the rows in the first part, of which there is one at least.

    Attributes:
        first (`dict[int, Tensor]`):
            The first part's hidden output `(b, T, D)`, with its graph, of each layer whose forward has just run.

    Raises:
        ValueError: If `share` does not lie in (0, 1].
    """

    def __init__(self, share: float) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"reference_share must lie in (0, 1], found {share}")
        self.share = share
        self.first: dict[int, Tensor] = {}
        self._replaced: list[tuple[nn.Module, Any]] = []

    def take_over(self, layers: Iterable[nn.Module]) -> None:
        """Takes the place of the layers' own forward, where there is anything to split."""
        if self.share == 1:
            return
        for index, layer in enumerate(layers):
            self._replaced.append((layer, vars(layer).get("forward")))
            layer.forward = partial(self._forward, index, layer.forward)

    def give_back(self) -> None:
        """Gives all layers their own forward back."""
        for layer, forward in self._replaced:
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward
        self._replaced.clear()
        self.first.clear()

    def _forward(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        size = _batch_size([*args, *kwargs.values()])
        rows = math.ceil(self.share * size)
        if rows == size:
            return forward(*args, **kwargs)
        first, rest = (
            forward(*_rows(args, part, size), **_rows(kwargs, part, size)) for part in (slice(rows), slice(rows, None))
        )
        self.first[index] = hidden_output(first)
        return _joined(first, rest)


def _batch_size(arguments: Iterable[Any]) -> int:
    """That of the hidden states, the first `(B, T, D)` tensor among a layer's arguments."""
    for value in arguments:
        if isinstance(value, Tensor) and value.dim() == 3:
            return len(value)
    raise ValueError(
        "a decoder layer is called without (batch, tokens, width) hidden states, whose rows could be split; leave "
        "reference_share at 1"
    )


def _rows(value: Any, part: slice, size: int) -> Any:
    """The rows of everything in `value` that has one for each of the batch's `size` samples."""
    if isinstance(value, Tensor):
        # What has one dimension, such as cache positions, is of tokens.
        return value[part] if value.dim() > 1 and len(value) == size else value
    if type(value) in (tuple, list):
        return type(value)(_rows(each, part, size) for each in value)
    if isinstance(value, Mapping):
        return {name: _rows(each, part, size) for name, each in value.items()}
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return value
    raise ValueError(
        f"a decoder layer is called with a {type(value).__name__}, which cannot be split into the batch's rows: turn "
        "the cache off (use_cache=False) if it is one, or leave reference_share at 1"
    )


def _joined(first: Any, rest: Any) -> Any:
    if isinstance(first, Tensor):
        return torch.cat([first, rest])
    if isinstance(first, tuple):
        return tuple(_joined(one, other) for one, other in zip(first, rest, strict=True))
    if first is None:
        return None
    raise ValueError(
        f"a decoder layer returns a {type(first).__name__}, which cannot be joined from two parts of a batch; leave "
        "reference_share at 1"
    )
