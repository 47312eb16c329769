"""What is assumed, noted and counted of each operation, in one go."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from hf_aegis.training.planning.assumed_values import AssumedValues
from hf_aegis.training.planning.flop_log import FlopLog
from hf_aegis.training.planning.storage_log import StorageLog


class Observation(TorchDispatchMode):
    """
    [`AssumedValues`], [`StorageLog`] and [`FlopLog`] as one context. Each context that an operation passes through
    takes about as long as the operation itself, where tensors have no values.

    Args:
        assumed ([`AssumedValues`]): What numbers are.
        log ([`StorageLog`]): Notes what comes and goes.
        flops ([`FlopLog`]): Counts.
    """

    def __init__(self, assumed: AssumedValues, log: StorageLog, flops: FlopLog) -> None:
        super().__init__()
        self.assumed, self.log, self.flops = assumed, log, flops

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        output = self.assumed.result(func, args, kwargs)
        self.log.note(output)
        self.flops.count(func, args, kwargs, output)
        return output
