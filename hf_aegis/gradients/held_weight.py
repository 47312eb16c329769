"""One weight whose action on a subspace of its inputs is held."""

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from hf_aegis.functional.product_precision import full_precision_products
from hf_aegis.gradients.shards import own_part


class HeldWeight:
    r"""
    Holds \\(W U = C\\) for the weight \\(W\\) of a linear layer, whatever an optimiser does to it, by
    \\(W \leftarrow W - ((W U - C) \mathrm{diag}(s)) U^\top\\). Or, with output directions \\(V\\), the pairs
    \\(V^\top W U = C\\), by \\(W \leftarrow W - V (S \circ (V^\top W U - C)) U^\top\\).

    Arithmetic is in float32 or better. A weight in half precision is rounded once per restoration, so that each of its
    rows comes within the rounding of that row of the constraint; as \\(C\\) stays what it was, that does not add up
    over steps.

    Where the weight is sharded by rows, a process works on its own rows. Whole input directions need nothing of the
    others; pairs do, as \\(V^\top W U\\) is a sum over all rows: one all-reduce of `(m, k)` numbers for each
    restoration, so that all processes have to call it. The weight may be sharded or moved after this was made: the
    process then keeps its own rows of what it has.

    Args:
        linear (`torch.nn.Module`):
            Has the weight, `(out, in)`. It is looked up anew each time.
        basis (`Tensor` of shape `(in, k)`):
            \\(U\\), orthonormal, on the weight's device, in float32 or better.
        target (`Tensor` of shape `(rows, k)` or `(m, k)`, *optional*):
            \\(C\\); without output directions for this process's rows of the weight. By default what the weight does
            now.
        share (`Tensor` of shape `(k,)` or `(m, k)`, *optional*):
            \\(s\\) or \\(S\\), from 0 to 1, or booleans: how much of the way each direction or pair is brought back.
            Ones by default.
        output_basis (`Tensor` of shape `(out, m)`, *optional*):
            \\(V\\), orthonormal, of the basis's dtype; all rows, also where the weight is sharded.

    Raises:
        ValueError: If the weight is not a matrix of floating-point numbers on this process, or sharded by columns.
    """

    def __init__(
        self,
        linear: nn.Module,
        basis: Tensor,
        target: Tensor | None = None,
        share: Tensor | None = None,
        output_basis: Tensor | None = None,
    ) -> None:
        self.linear = linear
        self.basis = basis
        self.share = share
        weight = local_rows(linear)
        self.output_basis = None if output_basis is None else own_part(output_basis, _weight(linear))
        self.target = self._action(weight) if target is None else target

    @torch.no_grad()
    def restore(self) -> None:
        """
        Brings the weight back to the constraint, in place.

        Raises:
            RuntimeError: If the weight has other rows than it had.
        """
        weight = self._rows()
        away = self._action(weight).sub_(self.target)
        if self.share is not None:
            away *= self.share
        # In TF32 where that is allowed: away from the constraint by a thousandth of what one step came away from it.
        with torch.autocast(weight.device.type, enabled=False):
            if self.output_basis is not None:
                away = self.output_basis @ away
            if weight.dtype == away.dtype:
                weight.addmm_(away, self.basis.T, alpha=-1)
            else:
                weight.copy_(torch.addmm(weight.to(away.dtype), away, self.basis.T, alpha=-1))

    @torch.no_grad()
    def deviation(self) -> float:
        r"""
        \\(\|W U - C\| / \|C\|\\) in the Frobenius norm, over this process's rows; or
        \\(\|V^\top W U - C\| / \|C\|\\) over the pairs that are held. Relative to \\(\|W\|\\) where \\(C = 0\\).
        """
        weight = self._rows()
        target, away = self.target, self._action(weight).sub_(self.target)
        if self.share is not None:
            target, away = target * (self.share != 0), away * (self.share != 0)
        whole = torch.linalg.vector_norm(target)
        if whole == 0:
            whole = torch.linalg.vector_norm(weight.to(away.dtype))
        return float(torch.linalg.vector_norm(away) / whole) if whole > 0 else 0.0

    def _rows(self) -> Tensor:
        weight = local_rows(self.linear)
        by_row = self.target if self.output_basis is None else self.output_basis
        if weight.shape[0] != by_row.shape[0] or weight.device != by_row.device:
            self._follow(weight, by_row)
        return weight

    def _follow(self, weight: Tensor, by_row: Tensor) -> None:
        """Goes where the weight went, and keeps this process's rows alone if it has been sharded."""
        whole: Any = self.linear.weight
        if by_row.shape[0] != whole.shape[0]:
            raise RuntimeError(
                f"a held weight has {weight.shape[0]} rows on {weight.device} in this process, but had "
                f"{by_row.shape[0]} on {by_row.device}: hold it anew, or after the model was moved and sharded"
            )
        mine = own_part(by_row, _weight(self.linear))
        if self.output_basis is None:
            self.target = mine
        else:
            self.output_basis, self.target = mine, self.target.to(weight.device)
        self.basis = self.basis.to(weight.device)
        self.share = None if self.share is None else self.share.to(weight.device)

    def _action(self, weight: Tensor) -> Tensor:
        r"""
        \\(W U\\) `(rows, k)` or \\(V^\top W U\\) `(m, k)` in the basis's precision, whatever autocast and TF32 say:
        it is the difference between two of these that tells how far the weight has come.
        """
        with full_precision_products(weight.device):
            action = weight.to(self.basis.dtype) @ self.basis
            if self.output_basis is None:
                return action
            action = self.output_basis.T @ action
        parameter: Any = self.linear.weight
        if isinstance(parameter, DTensor):
            for dim, placement in enumerate(parameter.placements):
                if placement.is_shard():
                    distributed.all_reduce(action, group=parameter.device_mesh.get_group(dim))
        return action


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


def _weight(linear: Any) -> Tensor:
    return linear.weight
