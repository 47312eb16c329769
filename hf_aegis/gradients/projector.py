"""Bends the gradients of one backward pass, group by group, while autograd delivers them."""

import contextlib
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from hf_aegis.functional.inner_product import inner_product
from hf_aegis.gradients.combiners import Combiner


logger = logging.getLogger(__name__)

Granularity = Literal["layer", "global", "tensor"]
UNPROTECTED = "unprotected"
GRANULARITIES: tuple[Granularity, ...] = ("layer", "global", "tensor")


# Whether gradients on the CPU are bent as on other devices.
_ON_DEVICE: ContextVar[bool] = ContextVar("on_device", default=False)


@contextlib.contextmanager
def bending_on_device() -> Iterator[None]:
    """Gradients on the CPU are bent as on other devices: for what plans those with shapes alone."""
    token = _ON_DEVICE.set(True)
    try:
        yield
    finally:
        _ON_DEVICE.reset(token)


def check_options(granularity: str, penalty_scale: float = 1.0) -> None:
    """
    Raises:
        ValueError: If the granularity is unknown, or the scale not positive.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {GRANULARITIES}, found {granularity!r}")
    if not penalty_scale > 0:
        raise ValueError(f"penalty_scale must be positive, found {penalty_scale}")


def bend(gradient: Tensor, reference: Tensor, alpha: Tensor) -> None:
    """`gradient -= alpha * reference` in place; `alpha` of exactly zero never touches the gradient."""
    if alpha.device.type != "cpu" or _ON_DEVICE.get():
        _bend_on_device(gradient, reference, alpha)
    elif (value := float(alpha)) != 0.0:
        wide = torch.promote_types(gradient.dtype, torch.float32)
        if gradient.dtype == wide:
            gradient.sub_(reference, alpha=value)
        else:
            # In half precision the coefficient would be rounded before it is used, and leave a part of the conflict.
            gradient.copy_(gradient.to(wide).sub_(reference.to(wide), alpha=value))


def _bend_on_device(gradient: Tensor, reference: Tensor, alpha: Tensor) -> None:
    # Reading `alpha` would make the host wait for the device, so the choice is made there.
    wide = torch.promote_types(gradient.dtype, torch.float32)
    bent = torch.addcmul(gradient.to(wide), reference.to(wide), -alpha.to(wide))
    gradient.copy_(torch.where(alpha != 0, bent, gradient))


class GradientProjector:
    """
    Collects task gradients and reference directions of one backward pass and projects each group as soon as it can.

    The vectors of a group run over the tensors that have a task gradient: a parameter that the task does not use
    stays without a gradient. A reference direction that is not finite leaves its group as it is.

    Args:
        group_of (`Callable[[str], str]`): The layer-wise group of a parameter's name.
        granularity (`"layer"`, `"global"` or `"tensor"`): Project each group, all as one vector, or each tensor.
        combiner ([`Combiner`]): Gives α from a group's scalars.
        metric (`Callable[[str], Tensor | None]`, *optional*):
            Gives, by a parameter's name, the positive weights of its elements in inner products and norms, where they
            are not all one.
        on_reference (`Callable[[str, str, Tensor], None]`, *optional*):
            Called for each parameter with what is projected as one vector with it, its name, and its reference
            direction, once that has done its work here.
        on_projected (`Callable[[Iterable[Parameter]], None]`, *optional*):
            Called with the parameters of each group that was projected.
    """

    def __init__(
        self,
        group_of: Callable[[str], str],
        granularity: Granularity,
        combiner: Combiner,
        metric: Callable[[str], Tensor | None] | None = None,
        on_reference: Callable[[str, str, Tensor], None] | None = None,
        on_projected: Callable[[Iterable[Parameter]], None] | None = None,
    ) -> None:
        self.combiner = combiner
        self.granularity = granularity
        self._metric = metric
        self._on_reference = on_reference
        self._on_projected = on_projected
        self._group_of = group_of
        self._references: dict[str, Tensor] = {}
        self._pending: dict[str, set[str]] = defaultdict(set)
        self._parameters: dict[str, dict[str, Parameter]] = defaultdict(dict)
        self._scalars: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)
        self._alphas: dict[str, Tensor] = {}
        self._watched: dict[str, Parameter] = {}
        self._watched_squares: list[Tensor] = []

    def unit(self, name: str) -> str:
        """What is projected as one vector with the parameter `name`."""
        return unit_of(name, self._group_of(name), self.granularity)

    def expect(self, names: Iterable[str]) -> None:
        """Announces parameters that will receive a reference direction."""
        for name in names:
            self._pending[self.unit(name)].add(name)

    def add_reference(self, name: str, reference: Tensor) -> None:
        """Adds to the reference direction of a parameter; it must precede the parameter's task gradient."""
        known = self._references.get(name)
        self._references[name] = reference if known is None else known + reference

    def reference(self, name: str) -> Tensor | None:
        """The reference direction of a parameter, until its group is projected."""
        return self._references.get(name)

    def take_reference(self, name: str) -> Tensor | None:
        """The same, and the projector lets go of it."""
        return self._references.pop(name, None)

    def on_gradient(self, name: str, gradient: Tensor) -> None:
        """Notes the scalars of this backward pass's task gradient, before it is accumulated."""
        refuse_sparse(name, gradient)
        weight = None if self._metric is None else self._metric(name)
        weighted = gradient if weight is None else gradient * weight
        squared = inner_product(gradient, weighted)
        reference = self._references.get(name)
        if reference is None:
            zero = torch.zeros_like(squared)
            self._scalars[self.unit(name)].append((zero, squared, zero))
            return
        dot = inner_product(weighted, reference)
        weighted = reference if weight is None else reference * weight
        self._scalars[self.unit(name)].append((dot, squared, inner_product(reference, weighted)))

    def watch(self, name: str, gradient: Tensor) -> None:
        """Notes the norm of a gradient that is not projected."""
        self._watched_squares.append(inner_product(gradient, gradient))

    def on_watched_accumulated(self, name: str, parameter: Parameter) -> None:
        """Notes a parameter whose gradient is not projected."""
        self._watched[name] = parameter

    def on_accumulated(self, name: str, parameter: Parameter) -> None:
        """Notes that `parameter.grad` holds the task gradient; projects the group if this was its last tensor."""
        unit = self.unit(name)
        self._parameters[unit][name] = parameter
        pending = self._pending.get(unit)
        if pending is not None and name in pending:
            pending.discard(name)
            if not pending and self.granularity != "global":
                self._project(unit)

    def finish(self) -> tuple[list[str], Tensor]:
        """
        Projects what is left and returns the groups with their scalars, `(G, 4)`: inner product, squared norms of task
        gradient and reference direction, α.
        """
        for unit in list(self._scalars):
            if unit not in self._alphas:
                self._project(unit)
        groups = sorted(self._scalars, key=natural_order)
        rows = [torch.cat([self._totals(unit), self._alphas[unit][None]]) for unit in groups]
        return groups, torch.stack(rows) if rows else torch.zeros(0, 4)

    def drop_non_finite(self, total: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> list[str]:
        """
        Removes the gradients of groups whose task gradient was not finite; returns the groups' names. `total` sums a
        tensor over processes.
        """
        groups: dict[str, Iterable[Parameter]] = {unit: self._parameters[unit].values() for unit in self._scalars}
        squares = [torch.stack([row[1] for row in rows]).sum() for rows in self._scalars.values()]
        if self._watched_squares:
            groups[UNPROTECTED] = self._watched.values()
            squares.append(torch.stack(self._watched_squares).sum())
        if not squares:
            return []
        return drop_where_not_finite(groups, total(torch.stack(squares)))

    def _totals(self, unit: str) -> Tensor:
        return torch.stack([torch.stack(row) for row in self._scalars[unit]]).sum(dim=0)

    def _project(self, unit: str) -> None:
        alpha = self.combiner(*self._totals(unit))
        self._alphas[unit] = alpha
        for name, parameter in self._parameters[unit].items():
            reference = self._references.pop(name, None)
            if reference is not None and parameter.grad is not None:
                bend(parameter.grad, reference, alpha)
                if self._on_reference is not None:
                    self._on_reference(unit, name, reference)
        if self._on_projected is not None:
            self._on_projected(self._parameters[unit].values())


def drop_where_not_finite(groups: Mapping[str, Iterable[Parameter]], squares: Tensor) -> list[str]:
    """
    Removes gradients that are not finite.

    Args:
        groups (`Mapping[str, Iterable[torch.nn.Parameter]]`): What is removed together.
        squares (`Tensor` of shape `(G,)`): Of each group, whatever is finite only where its gradient is.

    Returns:
        `list[str]`: Names of the groups that have no gradient any more.
    """
    finite = torch.isfinite(squares).tolist()
    dropped = [name for name, is_finite in zip(groups, finite, strict=True) if not is_finite]
    for name in dropped:
        for parameter in groups[name]:
            parameter.grad = None
    if dropped:
        logger.warning("dropped the gradients of %s: not finite", ", ".join(dropped))
    return dropped


def refuse_sparse(name: str, gradient: Tensor) -> None:
    """
    Raises:
        NotImplementedError: If the gradient of the parameter `name` is sparse.
    """
    if gradient.is_sparse:
        raise NotImplementedError(f"{name} has a sparse gradient; train it with `sparse=False`, or freeze it")


def unit_of(name: str, group: str, granularity: Granularity) -> str:
    """What is projected as one vector with the parameter `name` of the layer-wise group `group`."""
    if granularity == "tensor":
        return name
    return "global" if granularity == "global" else group


def natural_order(name: str) -> tuple[bool, list[tuple[bool, int, str]]]:
    """Sorting key of projection groups: layers first, by number."""
    parts = [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]
    return (not name.startswith("layers."), parts)
