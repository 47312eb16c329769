"""Floating-point operations of what runs, by the phase of a step."""

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class FlopLog(TorchDispatchMode):
    """
    A context that counts the operations of matrix products, convolutions and attention, by PyTorch's own formulas: two
    for each multiplication and addition. All else is left out, as in PyTorch's counter, whose hooks on modules this
    does without.

    Attributes:
        phase (`str`): What is counted under; to be set.
        flops (`Counter[str]`): Operations by phase.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.flops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        self.count(func, args, kwargs, output)
        return output

    def count(self, func: Any, args: tuple, kwargs: dict, output: Any) -> None:
        """Counts an operation that gave `output`."""
        formula = flop_registry.get(getattr(func, "overloadpacket", None))
        if formula is not None:
            self.flops[self.phase] += formula(*args, **kwargs, out_val=output)
