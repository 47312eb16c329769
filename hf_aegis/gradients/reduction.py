"""Gradients of several processes brought together in flat buffers, while the backward pass goes on."""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, distributed
from torch.nn import Parameter

from hf_aegis.gradients.data_parallel import refuse_disagreement


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


# Elements from which on a bucket is sent: the 25 MiB of DistributedDataParallel, in float32.
BUCKET_SIZE = 25 * 2**20 // 4


class FlatReduction:
    """
    A sum of tensors over processes that is under way: one flat buffer and one collective for each dtype.

    Args:
        tensors (`Sequence[Tensor]`): They are copied.
        process_group (`torch.distributed.ProcessGroup`): The processes.
    """

    def __init__(self, tensors: Sequence[Tensor], process_group: "ProcessGroup") -> None:
        self._shapes = [tensor.shape for tensor in tensors]
        self._places: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
        for index, tensor in enumerate(tensors):
            self._places[tensor.device, tensor.dtype].append(index)
        self._size = distributed.get_world_size(process_group)
        self._buffers = [torch.cat([tensors[i].reshape(-1) for i in places]) for places in self._places.values()]
        self._works = [distributed.all_reduce(flat, group=process_group, async_op=True) for flat in self._buffers]

    def wait(self, mean: bool) -> list[Tensor]:
        """The sums, or means, in the order of the tensors: views of the flat buffers. Once."""
        found: list[Tensor] = [torch.empty(0)] * len(self._shapes)
        for places, flat, work in zip(self._places.values(), self._buffers, self._works, strict=True):
            work.wait()
            if mean:
                flat.div_(self._size)
            pieces = flat.split([self._shapes[i].numel() for i in places])
            for index, piece in zip(places, pieces, strict=True):
                found[index] = piece.view(self._shapes[index])
        self._buffers.clear()
        return found


class GradientAverage:
    """
    Replaces gradients by their means over processes, bucket by bucket.

    Args:
        process_group (`torch.distributed.ProcessGroup`): The processes.
        names (`Mapping[int, str]`): The parameters' names, by their `id`.

    Raises:
        RuntimeError: If processes come with different parameters.
    """

    def __init__(self, process_group: "ProcessGroup", names: Mapping[int, str]) -> None:
        self.process_group = process_group
        self._names = names
        self._device: torch.device | None = None
        self._waiting: list[Parameter] = []
        self._done: set[int] = set()
        self._under_way: list[tuple[list[Parameter], FlatReduction]] = []

    def add(self, parameters: Iterable[Parameter]) -> None:
        """Takes parameters whose `grad` is complete, in the same order in all processes; those it has had it skips."""
        for parameter in parameters:
            if parameter.grad is not None and id(parameter) not in self._done:
                self._done.add(id(parameter))
                self._device = parameter.device
                self._waiting.append(parameter)
                if sum(p.numel() for p in self._waiting) >= BUCKET_SIZE:
                    self._launch()

    def finish(self) -> None:
        """Waits for all of them."""
        # Also where nothing waits here, as something may in another process.
        self._launch()
        for parameters, reduction in self._under_way:
            for parameter, mean in zip(parameters, reduction.wait(mean=True), strict=True):
                parameter.grad = mean
        self._under_way.clear()

    def _launch(self) -> None:
        parameters, self._waiting = self._waiting, []
        if self._device is not None:
            refuse_disagreement((self._names[id(p)] for p in parameters), self._device, self.process_group)
        if parameters:
            gradients = [p.grad for p in parameters if p.grad is not None]
            self._under_way.append((parameters, FlatReduction(gradients, self.process_group)))


class TensorAverage:
    """
    Means of tensors over processes that are under way, bucket by bucket.

    Args:
        tensors (`dict[str, Tensor]`): By names that all processes have in one order. It is emptied.
        process_group (`torch.distributed.ProcessGroup`): The processes.

    Raises:
        RuntimeError: If the processes' names differ.
    """

    def __init__(self, tensors: dict[str, Tensor], process_group: "ProcessGroup") -> None:
        self._under_way: list[tuple[list[str], FlatReduction]] = []
        waiting: dict[str, Tensor] = {}
        if tensors:
            refuse_disagreement(tensors, next(iter(tensors.values())).device, process_group)
        for name in list(tensors):
            waiting[name] = tensors.pop(name)
            if not tensors or sum(t.numel() for t in waiting.values()) >= BUCKET_SIZE:
                self._under_way.append((list(waiting), FlatReduction(list(waiting.values()), process_group)))
                waiting.clear()

    def wait(self) -> dict[str, Tensor]:
        """The means, by name. Once."""
        means: dict[str, Tensor] = {}
        for names, reduction in self._under_way:
            means.update(zip(names, reduction.wait(mean=True), strict=True))
        self._under_way.clear()
        return means


def average_over_processes(
    tensors: Mapping[str, Tensor], process_group: "ProcessGroup | None" = None
) -> dict[str, Tensor]:
    """
    Means of tensors over processes, by names that all have in one order.

    Args:
        tensors (`Mapping[str, Tensor]`): They are copied.
        process_group (`torch.distributed.ProcessGroup`, *optional*): The processes; all of them by default.
    """
    processes = distributed.group.WORLD if process_group is None else process_group
    assert processes is not None, "torch.distributed has not been initialised"
    return TensorAverage(dict(tensors), processes).wait()


class _Bucket(NamedTuple):
    parameters: dict[str, Parameter]
    gradients: FlatReduction
    references: tuple[str, ...]
    reference_sums: FlatReduction | None


class PairedReduction:
    """
    Brings the task gradients of all processes together (their mean), and with them the reference directions (their
    sum: each process has that of its own tokens' share of one penalty), so that both can be projected.

    A group's two gradients are sent as soon as all of them are there, and waited for when the next bucket has been
    sent: the processes communicate while autograd works on the layer below. Processes must come to the same parameters
    in the same order, which those that run the same forward pass do.

    Args:
        process_group (`torch.distributed.ProcessGroup`): The processes.
        group_of (`Callable[[str], str]`): The layer-wise group of a parameter's name.
        take_reference (`Callable[[str], Tensor | None]`): Hands over this process's reference direction.
        add_reference (`Callable[[str, Tensor], None]`): Takes the sum over the processes.
        deliver (`Callable[[str, Parameter, Tensor, Tensor | None], None]`):
            Takes a parameter with its name, the mean of this backward pass's gradients, and what had been accumulated
            in `grad` before; it puts their sum back there.
    """

    def __init__(
        self,
        process_group: "ProcessGroup",
        group_of: Callable[[str], str],
        take_reference: Callable[[str], Tensor | None],
        add_reference: Callable[[str, Tensor], None],
        deliver: Callable[[str, Parameter, Tensor, Tensor | None], None],
    ) -> None:
        self.process_group = process_group
        self._group_of = group_of
        self._take_reference = take_reference
        self._add_reference = add_reference
        self._deliver = deliver
        self._expected: dict[str, set[str]] = defaultdict(set)
        self._arrived: dict[str, dict[str, Parameter]] = defaultdict(dict)
        self._loose: dict[str, Parameter] = {}
        self._device: torch.device | None = None
        self._before: dict[str, tuple[Parameter, Tensor | None]] = {}
        self._under_way: deque[_Bucket] = deque()

    def expect(self, names: Iterable[str]) -> None:
        """Announces parameters that will receive a reference direction, and are sent group by group."""
        for name in names:
            self._expected[self._group_of(name)].add(name)

    def set_aside(self, name: str, parameter: Parameter) -> None:
        """Makes room for this backward pass's gradient alone; called before it is accumulated."""
        self._device = parameter.device
        self._before[name] = (parameter, parameter.grad)
        parameter.grad = None

    def arrived(self, name: str, parameter: Parameter) -> None:
        """Notes that `parameter.grad` holds this backward pass's gradient of this process."""
        group = self._group_of(name)
        expected = self._expected.get(group)
        if expected is None or name not in expected:
            self._loose[name] = parameter
            if sum(p.numel() for p in self._loose.values()) >= BUCKET_SIZE:
                self.send_loose()
            return
        self._arrived[group][name] = parameter
        expected.discard(name)
        if not expected:
            self._send(self._arrived.pop(group))

    def send_loose(self) -> list[str]:
        """Sends what has arrived and has no reference direction; returns the names."""
        loose, self._loose = self._loose, {}
        if loose:
            # Those of the layers are known to agree when the layers' moments have been exchanged.
            refuse_disagreement(loose, next(iter(loose.values())).device, self.process_group)
            self._send(loose)
        return list(loose)

    def finish(self) -> None:
        """Sends what is left, and waits for all."""
        left = [*self._arrived.values(), self._loose]
        self._arrived, self._loose = defaultdict(dict), {}
        # Also where nothing is left here, as something may be in another process.
        if self._device is not None:
            refuse_disagreement((name for part in left for name in part), self._device, self.process_group)
        for part in left:
            if part:
                self._send(part)
        while self._under_way:
            self._settle()

    def abandon(self) -> None:
        """Gives back what had been accumulated before a backward pass that failed."""
        for parameter, gradient in self._before.values():
            parameter.grad = gradient
        self._before.clear()
        self._under_way.clear()

    def _send(self, parameters: Mapping[str, Parameter]) -> None:
        gradients = [p.grad for p in parameters.values() if p.grad is not None]
        references = {name: r for name in parameters if (r := self._take_reference(name)) is not None}
        bucket = _Bucket(
            dict(parameters),
            FlatReduction(gradients, self.process_group),
            tuple(references),
            FlatReduction(list(references.values()), self.process_group) if references else None,
        )
        for parameter in parameters.values():
            parameter.grad = None  # the buffer has it
        self._under_way.append(bucket)
        while len(self._under_way) > 1:
            self._settle()

    def _settle(self) -> None:
        bucket = self._under_way.popleft()
        gradients = bucket.gradients.wait(mean=True)
        if bucket.reference_sums is not None:
            for name, reference in zip(bucket.references, bucket.reference_sums.wait(mean=False), strict=True):
                self._add_reference(name, reference)
        for (name, parameter), gradient in zip(bucket.parameters.items(), gradients, strict=True):
            _, before = self._before.pop(name)
            self._deliver(name, parameter, gradient, before)
