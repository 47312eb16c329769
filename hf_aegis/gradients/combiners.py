"""
Combiners: how a task gradient and a reference gradient become one update.

What the reference is (a penalty's gradient, a replayed batch's gradient) is no concern of a combiner, and how the two
are combined is no concern of whatever supplies the reference.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hf_aegis.functional.gradient_surgery import drop_by_sign, pcgrad_coefficients
from hf_aegis.functional.gram_schmidt import one_sided_coefficient, restoring_coefficient
from hf_aegis.functional.inner_product import inner_product


class Combiner(Protocol):
    """How a task gradient is bent: from scalars of a group to α in `g - α r`."""

    def __call__(self, dot: Tensor, task_squared_norm: Tensor, reference_squared_norm: Tensor) -> Tensor: ...


class GroupScalars(NamedTuple):
    """Inner product and squared norms of a group's task gradient and reference gradient, each a scalar tensor."""

    dot: Tensor
    task_squared_norm: Tensor
    reference_squared_norm: Tensor

    @property
    def are_finite(self) -> Tensor:
        """Whether all three are finite, a boolean scalar."""
        return torch.isfinite(torch.stack(self)).all()


def group_scalars(task: Sequence[Tensor], reference: Sequence[Tensor]) -> GroupScalars:
    """
    The scalars of two gradients that are spread over tensors, as if each were one flat vector.

    Raises:
        ValueError: If there are no tensors, or the two lists do not have the same shapes.
    """
    shapes = [tuple(tensor.shape) for tensor in task], [tuple(tensor.shape) for tensor in reference]
    if not task or shapes[0] != shapes[1]:
        raise ValueError(f"task and reference gradients must have the same shapes, found {shapes[0]} and {shapes[1]}")
    rows = [
        torch.stack([inner_product(g, r), inner_product(g, g), inner_product(r, r)])
        for g, r in zip(task, reference, strict=True)
    ]
    return GroupScalars(*torch.stack([row.to(rows[0].device) for row in rows]).sum(dim=0))


class GradientCombiner(Combiner, Protocol):
    """
    A combiner that also works on two whole gradients.

    Attributes:
        symmetric (`bool`): Whether the reference gradient is itself a part of the update, and not only a direction
            that the task gradient must not work against.
    """

    symmetric: bool

    def combine(
        self,
        task: Sequence[Tensor],
        reference: Sequence[Tensor],
        generator: torch.Generator | None = None,
        scalars: GroupScalars | None = None,
    ) -> list[Tensor]:
        """
        The update of one group.

        Args:
            task, reference (`Sequence[Tensor]`): Gradients of the group's parameters, in one order, zeros where a
                parameter has none. Together they count as one flat vector each.
            generator (`torch.Generator`, *optional*): What random combiners draw from.
            scalars ([`GroupScalars`], *optional*): Those of `task` and `reference`, if they are known already.

        Returns:
            `list[Tensor]`: In the dtypes of `task`; computed in float32 or better. Where either gradient is not
            finite the task gradient comes back as it is, so that a reference never makes a NaN, and whatever watches
            over the task gradient sees it.

        Raises:
            ValueError: If the shapes differ.
        """
        ...


class OneSidedGramSchmidt:
    """
    Removes the conflicting component of the task gradient and nothing else: AEGIS's combiner (arXiv 2604.16067, §3.3),
    and that of A-GEM (arXiv 1812.00420) where the reference is a replayed batch's gradient.

    Args:
        eps (`float`, *optional*, defaults to `1e-12`): Damping of the denominator, positive.
        restoring (`float`, *optional*, defaults to `0.0`):
            Adds the reference gradient at this share of the task gradient's length, whether or not the two conflict.
            Published is 0: what is lost is never sought again.
    """

    symmetric = False

    def __init__(self, eps: float = 1e-12, restoring: float = 0.0) -> None:
        if not 0 <= restoring < math.inf:
            raise ValueError(f"restoring must be finite and not negative, found {restoring}")
        self.eps = _positive(eps)
        self.restoring = restoring

    def __call__(self, dot: Tensor, task_squared_norm: Tensor, reference_squared_norm: Tensor) -> Tensor:
        alpha = one_sided_coefficient(dot, reference_squared_norm, self.eps)
        if self.restoring:
            alpha = alpha + restoring_coefficient(task_squared_norm, reference_squared_norm, self.restoring)
        return alpha

    def combine(
        self,
        task: Sequence[Tensor],
        reference: Sequence[Tensor],
        generator: torch.Generator | None = None,
        scalars: GroupScalars | None = None,
    ) -> list[Tensor]:
        """`g - α r`; an agreeing gradient is left as it is, bit for bit. See [`GradientCombiner`]."""
        alpha = self(*(scalars or group_scalars(task, reference)))
        return _each(task, reference, alpha != 0, lambda g, r: g - alpha.to(g) * r)


class PCGrad:
    """
    Projects each of the two gradients off the original other one where they conflict, and adds them
    (arXiv 2001.06782).

    Args:
        eps (`float`, *optional*, defaults to `1e-12`): Damping of the denominators, positive.
    """

    symmetric = True

    def __init__(self, eps: float = 1e-12) -> None:
        self.eps = _positive(eps)

    def __call__(self, dot: Tensor, task_squared_norm: Tensor, reference_squared_norm: Tensor) -> Tensor:
        return one_sided_coefficient(dot, reference_squared_norm, self.eps)

    def combine(
        self,
        task: Sequence[Tensor],
        reference: Sequence[Tensor],
        generator: torch.Generator | None = None,
        scalars: GroupScalars | None = None,
    ) -> list[Tensor]:
        """`(1 - β) g + (1 - α) r`. See [`GradientCombiner`]."""
        scalars = scalars or group_scalars(task, reference)
        alpha, beta = pcgrad_coefficients(*scalars, self.eps)
        return _each(
            task, reference, scalars.are_finite, lambda g, r: (1.0 - beta.to(g)) * g + (1.0 - alpha.to(g)) * r
        )


class GradDrop:
    """Keeps, element by element, the gradients of one sign, drawn by how much it outweighs (arXiv 2010.06808)."""

    symmetric = True

    def __call__(self, dot: Tensor, task_squared_norm: Tensor, reference_squared_norm: Tensor) -> Tensor:
        return torch.zeros_like(dot)

    def combine(
        self,
        task: Sequence[Tensor],
        reference: Sequence[Tensor],
        generator: torch.Generator | None = None,
        scalars: GroupScalars | None = None,
    ) -> list[Tensor]:
        """The kept parts' sum; draws one number per element, tensor by tensor. See [`GradientCombiner`]."""
        scalars = scalars or group_scalars(task, reference)

        def drop(g: Tensor, r: Tensor) -> Tensor:
            device = g.device if generator is None else generator.device
            uniform = torch.rand(g.shape, generator=generator, dtype=g.dtype, device=device)
            return drop_by_sign(g, r, uniform.to(g.device))

        return _each(task, reference, scalars.are_finite, drop)


COMBINERS: dict[str, type[OneSidedGramSchmidt] | type[PCGrad] | type[GradDrop]] = {
    "one_sided": OneSidedGramSchmidt,
    "pcgrad": PCGrad,
    "graddrop": GradDrop,
}


def make_combiner(name: str, eps: float = 1e-12) -> GradientCombiner:
    """
    A combiner by its name.

    Args:
        name (`str`): `"one_sided"`, `"pcgrad"` or `"graddrop"`.
        eps (`float`, *optional*, defaults to `1e-12`): Damping of the projections; GradDrop has none.

    Raises:
        ValueError: If the name is unknown or `eps` is not positive.
    """
    if name not in COMBINERS:
        raise ValueError(f"combiner must be one of {tuple(COMBINERS)}, found {name!r}")
    if name == "graddrop":
        return GradDrop()
    return OneSidedGramSchmidt(eps) if name == "one_sided" else PCGrad(eps)


def _each(
    task: Sequence[Tensor], reference: Sequence[Tensor], where: Tensor, function: Callable[[Tensor, Tensor], Tensor]
) -> list[Tensor]:
    # Chosen on the device: reading `where` would make the host wait for it.
    combined = []
    for g, r in zip(task, reference, strict=True):
        wide = torch.promote_types(g.dtype, torch.float32)
        update = function(g.to(wide), r.to(wide)).to(g.dtype)
        combined.append(torch.where(where.to(g.device), update, g))
    return combined


def _positive(eps: float) -> float:
    if not eps > 0:
        raise ValueError(f"the projection's eps must be positive, found {eps}")
    return eps
