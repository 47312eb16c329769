"""What code that looks at numbers is told where there are only shapes."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class AssumedValues(TorchDispatchMode):
    """
    A context in which every number that is read off a tensor is one, or true, and every boolean mask selects a given
    number of elements. So nothing is skipped: every group of parameters is projected, no step is dropped.

    Args:
        selected (`int`): How many elements a boolean mask selects: the labelled tokens of a batch.
    """

    def __init__(self, selected: int) -> None:
        super().__init__()
        self.selected = selected

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return self.result(func, args, kwargs or {})

    def result(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """What an operation gives: its own result, or what is assumed."""
        if func is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        if func is torch.ops.aten.index.Tensor and _is_mask(args[1][0]):
            values, mask = args[0], args[1][0]
            return values.new_empty((self.selected, *values.shape[mask.dim() :]))
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_empty((self.selected, args[0].dim()), dtype=torch.long)
        return func(*args, **kwargs)


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype == torch.bool
