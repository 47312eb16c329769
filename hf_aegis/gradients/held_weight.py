"""One weight whose action on a subspace of its inputs is held."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class HeldWeight:
    r"""
    Holds \\(W U = C\\) for the weight \\(W\\) of a linear layer, whatever an optimiser does to it, by
    \\(W \leftarrow W - ((W U - C) \mathrm{diag}(s)) U^\top\\).

    Arithmetic is in float32 or better. A weight in half precision is rounded once per restoration, so that each of its
    rows comes within the rounding of that row of the constraint; as \\(C\\) stays what it was, that does not add up
    over steps. Where the weight is sharded by rows, a process works on its own rows and needs nothing of the others.

    Args:
        linear (`torch.nn.Module`):
            Has the weight, `(out, in)`. It is looked up anew each time.
        basis (`Tensor` of shape `(in, k)`):
            \\(U\\), orthonormal, on the weight's device, in float32 or better.
        target (`Tensor` of shape `(rows, k)`, *optional*):
            \\(C\\), for this process's rows of the weight. By default what the weight does now; see [`pinned`].
        share (`Tensor` of shape `(k,)`, *optional*):
            \\(s\\), from 0 to 1: how much of the way each direction is brought back. Ones by default.

    Raises:
        ValueError: If the weight is not a matrix of floating-point numbers on this process, or sharded by columns.
    """

    def __init__(
        self, linear: nn.Module, basis: Tensor, target: Tensor | None = None, share: Tensor | None = None
    ) -> None:
        self.linear = linear
        self.basis = basis
        self.share = share
        self.target = pinned(linear, basis) if target is None else target

    @torch.no_grad()
    def restore(self) -> None:
        """
        Brings the weight back to the constraint, in place.

        Raises:
            RuntimeError: If the weight was sharded since, or moved to another device.
        """
        weight = self._rows()
        away = self._away(weight)
        if self.share is not None:
            away *= self.share
        # In TF32 where that is allowed: away from the constraint by a thousandth of what one step came away from it.
        with torch.autocast(weight.device.type, enabled=False):
            if weight.dtype == away.dtype:
                weight.addmm_(away, self.basis.T, alpha=-1)
            else:
                weight.copy_(torch.addmm(weight.to(away.dtype), away, self.basis.T, alpha=-1))

    @torch.no_grad()
    def deviation(self) -> float:
        r"""
        \\(\|W U - C\| / \|C\|\\) in the Frobenius norm, over this process's rows; relative to \\(\|W\|\\) where
        \\(C = 0\\).
        """
        weight = self._rows()
        away = torch.linalg.vector_norm(self._away(weight))
        whole = torch.linalg.vector_norm(self.target)
        if whole == 0:
            whole = torch.linalg.vector_norm(weight.to(away.dtype))
        return float(away / whole) if whole > 0 else 0.0

    def _rows(self) -> Tensor:
        weight = local_rows(self.linear)
        if weight.shape[0] != self.target.shape[0] or weight.device != self.target.device:
            raise RuntimeError(
                f"a held weight has {weight.shape[0]} rows on {weight.device} in this process, but had "
                f"{self.target.shape[0]} on {self.target.device}: hold it after the model was moved and sharded"
            )
        return weight

    def _away(self, weight: Tensor) -> Tensor:
        return product(weight, self.basis).sub_(self.target)


def local_rows(linear: nn.Module) -> Tensor:
    """
    This process's rows of a linear layer's weight, `(rows, in)`; they share the weight's memory.

    Raises:
        ValueError: If the weight is not a matrix of floating-point numbers on this process, or sharded by columns.
    """
    parameter: Any = linear.weight
    weight: Tensor = parameter.detach()
    if isinstance(weight, DTensor):
        if not all(placement.is_replicate() or placement.is_shard(0) for placement in weight.placements):
            raise ValueError(
                f"a weight is placed as {weight.placements}; only weights that are replicated or sharded by rows, "
                "Shard(0), can be held"
            )
        weight = weight.to_local()
    if weight.dim() != 2 or weight.shape[1] != linear.in_features or not weight.is_floating_point() or weight.is_meta:
        raise ValueError(
            f"a weight is a {weight.dtype} tensor of shape {tuple(weight.shape)} on {weight.device}, expected "
            f"floating-point rows of {linear.in_features}: quantised and flattened (FSDP1, ZeRO-3) weights cannot be "
            "held"
        )
    return weight


@torch.no_grad()
def pinned(linear: nn.Module, basis: Tensor) -> Tensor:
    r"""What this process's rows of a weight now do on a subspace, \\(W U\\): `(rows, k)`."""
    return product(local_rows(linear), basis)


def product(weight: Tensor, basis: Tensor) -> Tensor:
    r"""
    \\(W U\\) `(rows, k)` in the basis's precision, whatever autocast and TF32 say: it is the difference between two of
    these that tells how far the weight has come.
    """
    with torch.autocast(weight.device.type, enabled=False), _without_tf32(weight.device):
        return weight.to(basis.dtype) @ basis


@contextmanager
def _without_tf32(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    precision = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision
