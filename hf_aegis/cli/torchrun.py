"""The processes that `torchrun` has started for one command."""

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@contextlib.contextmanager
def torchrun_processes() -> Iterator["ProcessGroup | None"]:
    """
    The processes that work on the same command, for the duration of the block; `None` where one is alone. Where there
    are GPUs, each process's own becomes its current one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield None
        return

    import torch
    from torch import distributed

    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend)
    try:
        yield distributed.group.WORLD
    finally:
        distributed.destroy_process_group()


def is_main_process(process_group: "ProcessGroup | None") -> bool:
    """Whether a process is the first of its group, or alone."""
    if process_group is None:
        return True
    from torch import distributed

    return distributed.get_rank(process_group) == 0
