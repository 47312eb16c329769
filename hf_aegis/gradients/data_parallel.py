"""The processes that train one model, each on its share of a batch."""

import contextlib
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from hf_aegis.functional.moments import Moments, masked_moments, merge_moments


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


ProjectionScope = Literal["global", "rank"]
PROJECTION_SCOPES: tuple[ProjectionScope, ...] = ("global", "rank")


class LayerMoments(NamedTuple):
    """Mean `(D,)`, population variance `(D,)` and number of tokens `()` of a layer's output."""

    mean: Tensor
    variance: Tensor
    # Named as in `Moments`; a tuple's own method is of no use here.
    count: Tensor  # type: ignore[assignment]

    @classmethod
    def of(cls, hidden: Tensor, mask: Tensor | None) -> "LayerMoments":
        """Those of hidden states `(B, T, D)` where `mask` `(B, T)` says that a token counts; differentiable."""
        return cls(*masked_moments(hidden, mask))

    def merged(self, other: "LayerMoments") -> "LayerMoments":
        """Those of both together; differentiable."""
        both = merge_moments(self._mergeable(), other._mergeable())
        return LayerMoments(both.mean, both.variance, both.count)

    def _mergeable(self) -> Moments:
        return Moments(self.count, self.mean, self.variance * self.count)


class SharedMoments(NamedTuple):
    """
    Moments of all layers over a batch that is spread over processes.

    Attributes:
        total (`list[LayerMoments]`): Over all processes; bit for bit the same in each.
        others (`list[LayerMoments]`): Over all processes but this one.
    """

    total: list[LayerMoments]
    others: list[LayerMoments]


def find_ddp(model: nn.Module) -> DistributedDataParallel | None:
    """The `DistributedDataParallel` that `model` is, or that `torch.compile` has wrapped."""
    model = getattr(model, "_orig_mod", model)
    return model if isinstance(model, DistributedDataParallel) else None


def inside_ddp(model: nn.Module) -> nn.Module:
    """The model that a `DistributedDataParallel` trains; `model` itself where it is none."""
    ddp = find_ddp(model)
    return model if ddp is None else ddp.module


def find_process_group(model: nn.Module, process_group: "ProcessGroup | None" = None) -> "ProcessGroup | None":
    """
    The processes that `model` is trained by.

    Args:
        model (`torch.nn.Module`): What is trained, wrapped or not.
        process_group (`torch.distributed.ProcessGroup`, *optional*):
            By default that of a `DistributedDataParallel`, else all processes, if torch.distributed was initialised.

    Returns:
        `torch.distributed.ProcessGroup`: `None` where one process trains alone.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    if process_group is None:
        ddp = find_ddp(model)
        process_group = distributed.group.WORLD if ddp is None else ddp.process_group
    return process_group if distributed.get_world_size(process_group) > 1 else None


@contextlib.contextmanager
def without_ddp_reduction(model: nn.Module) -> Iterator[bool]:
    """
    A block in which `DistributedDataParallel` leaves gradients alone. Yields whether it would have reduced them; that
    it would not is how loops that accumulate gradients (`no_sync`) say that more micro-batches will follow.

    Raises:
        ValueError: If it was made with `static_graph=True`.
    """
    ddp = find_ddp(model)
    if ddp is None:
        yield True
        return
    if ddp.static_graph:
        raise ValueError(
            "DistributedDataParallel(static_graph=True) counts on reducing the gradients itself, which has to be left "
            "to the shield: leave static_graph out"
        )
    wanted = bool(ddp.require_backward_grad_sync)
    with ddp.no_sync():
        yield wanted


def refuse_ddp_reduction() -> None:
    """
    Raises:
        RuntimeError: If the forward pass under way is that of a `DistributedDataParallel` which will reduce gradients.
    """
    active: Any = DistributedDataParallel._get_active_ddp_module()
    if active is not None and active.require_backward_grad_sync:
        raise RuntimeError(
            "DistributedDataParallel would reduce the gradients before they are projected, and again afterwards: make "
            "the shield for the DistributedDataParallel itself, not for the model inside of it"
        )


# By process group, what its processes have been found to agree on.
_AGREED: dict[str, set[int]] = defaultdict(set)


def refuse_disagreement(names: Iterable[str], device: torch.device, process_group: "ProcessGroup") -> None:
    """
    One small collective, before those that `names` are for.

    Args:
        names (`Iterable[str]`): What has to be the same in all processes, or their next collectives would not fit.
        device (`torch.device`): Where the process group communicates.
        process_group (`torch.distributed.ProcessGroup`): The processes; all have to call it.

    Raises:
        RuntimeError: If `names` differ. On an accelerator this is looked at where they are new to this process only,
            since the host would wait for the device each time.
    """
    signature = _signature(names)
    mine = torch.tensor([signature], device=device)
    everyone = [torch.empty_like(mine) for _ in range(distributed.get_world_size(process_group))]
    distributed.all_gather(everyone, mine, group=process_group)
    agreed = _AGREED[process_group.group_name]
    if device.type == "cpu" or signature not in agreed:
        agreed.add(signature)
        _refuse_different([int(theirs) for theirs in everyone])


def _signature(names: Iterable[str]) -> int:
    """24 bits, which float32 holds exactly."""
    return zlib.crc32("\n".join(names).encode()) >> 8


def _refuse_different(signatures: Sequence[int]) -> None:
    if len(set(signatures)) > 1:
        raise RuntimeError(
            "the processes' backward passes use different parameters, so that their gradients cannot be brought "
            "together: give each process a batch of the same make (all with images, for instance)"
        )


class MomentsExchange:
    """
    Brings the moments of all processes together.

    Args:
        process_group (`torch.distributed.ProcessGroup`): The processes.
    """

    def __init__(self, process_group: "ProcessGroup") -> None:
        self.process_group = process_group

    @torch.no_grad()
    def __call__(self, moments: Sequence[LayerMoments], names: Iterable[str] = ()) -> SharedMoments:
        """
        One collective for all layers.

        Args:
            moments (`Sequence[LayerMoments]`): Those of this process, layer by layer.
            names (`Iterable[str]`): What has to be the same in all processes, or their next collectives would not fit.

        Raises:
            RuntimeError: If `names` differ; as [`refuse_disagreement`].
        """
        signature = _signature(names)
        rows = [torch.cat([m.mean, m.variance, m.count[None]]) for m in moments]
        mine = torch.cat([*rows, rows[0].new_full((1,), float(signature))]).detach()
        everyone = [torch.empty_like(mine) for _ in range(distributed.get_world_size(self.process_group))]
        distributed.all_gather(everyone, mine, group=self.process_group)
        agreed = _AGREED[self.process_group.group_name]
        if mine.device.type == "cpu" or signature not in agreed:
            agreed.add(signature)
            _refuse_different([int(theirs[-1]) for theirs in everyone])
        rank = distributed.get_rank(self.process_group)
        # Layers are stacked, `(L, D)`, so that a merge is one operation for all.
        tables = [_unstacked(theirs[:-1].view(len(rows), -1)) for theirs in everyone]
        return SharedMoments(_merge(tables), _merge([table for other, table in enumerate(tables) if other != rank]))


def total_over_processes(value: Tensor, process_group: "ProcessGroup | None") -> Tensor:
    """The sum of `value` over the processes, without a graph; `value` itself where one process is alone."""
    if process_group is None:
        return value
    value = value.detach().clone()
    distributed.all_reduce(value, group=process_group)
    return value


def as_share(value: Tensor, process_group: "ProcessGroup | None") -> Tensor:
    """
    A value that is the same in all processes, and that each of them can differentiate with respect to its own share of
    the batch only: with a gradient whose *mean* over processes, which data parallelism takes, is the whole one.
    """
    if process_group is None:
        return value
    size = distributed.get_world_size(process_group)
    return size * value - (size - 1) * value.detach()


def _unstacked(table: Tensor) -> LayerMoments:
    mean, variance, count = table.split([table.shape[1] // 2, table.shape[1] // 2, 1], dim=1)
    return LayerMoments(mean, variance, count)


def _merge(tables: Sequence[LayerMoments]) -> list[LayerMoments]:
    merged = tables[0]
    for table in tables[1:]:
        merged = merged.merged(table)
    return [LayerMoments(mean, variance, count[0]) for mean, variance, count in zip(*merged, strict=True)]
