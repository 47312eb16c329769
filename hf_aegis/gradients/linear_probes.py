"""A sample of each linear layer's inputs, and what the layer makes of them now as against before."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from hf_aegis.functional.product_precision import full_precision_products
from hf_aegis.gradients.held_pairs import HeldPairs
from hf_aegis.gradients.linear_sites import LinearSite, orthonormal_basis


if TYPE_CHECKING:
    from hf_aegis.anchors import InputSubspace


@dataclass(frozen=True)
class LinearDeviation:
    r"""
    How a linear layer's output \\(y\\) on sampled anchored inputs \\(x\\) changed from \\(y_0\\). Norms are taken over
    all sampled inputs together.

    Attributes:
        output (`float`): \\(\|y - y_0\| / \|y_0\|\\).
        inside (`float`): The part from within the subspace, \\(\|(W U - C) U^\top x\| / \|y_0\|\\); where pairs of
            directions are held, theirs, \\(\|V (M \circ (V^\top W U - C)) U^\top x\| / \|y_0\|\\).
        outside (`float`): The rest, with what a bias changed: from outside of it,
            \\(\|(W - W_0)(I - U U^\top) x\| / \|y_0\|\\).
        outside_energy (`float`): Share of the inputs' energy outside of the subspace,
            \\(\|(I - U U^\top) x\|^2 / \|x\|^2\\).
        inputs (`int`): Number of inputs.
    """

    output: float
    inside: float
    outside: float
    outside_energy: float
    inputs: int


class RowSample:
    """
    A uniform sample, without replacement, of the rows that come along, of which there may be any number.

    Samples of one size and seed take the same places of streams of one length.

    Args:
        size (`int`): Most rows that are kept; they are kept on the CPU.
        seed (`int`): Of the sample.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self._generator = torch.Generator().manual_seed(seed)
        self._rows: Tensor | None = None
        self._keys = torch.empty(0, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Adds rows `(n, width)`. Each draws a random key, and those with the smallest keys stay."""
        keys = torch.rand(rows.shape[0], dtype=torch.float64, generator=self._generator)
        # First among themselves, so that only few are copied.
        near = keys.argsort()[: self.size]
        rows, keys = rows[near.to(rows.device)].cpu(), keys[near]
        if self._rows is not None:
            rows, keys = torch.cat([self._rows, rows]), torch.cat([self._keys, keys])
        order = keys.argsort()[: self.size]
        self._rows, self._keys = rows[order], keys[order]

    def rows(self) -> Tensor | None:
        """The sampled rows, `(at most size, width)`; `None` if there were none at all."""
        return self._rows


class LinearProbes:
    """
    Samples inputs of held linears while the model runs, and remembers their outputs.

    Args:
        sites (`Mapping[str, Sequence[LinearSite]]`): The linears, by name; the first of each runs.
        subspaces (`Sequence[InputSubspace]`): Their subspaces.
        ranks (`Mapping[str, int]`): How many directions of the subspace count as inside, for each linear.
        pairs (`Mapping[str, HeldPairs]`): Where single pairs count as inside in place of whole directions.
        size (`int`): Inputs for each subspace.
        seed (`int`): Of the samples.
    """

    def __init__(
        self,
        sites: Mapping[str, Sequence[LinearSite]],
        subspaces: Sequence["InputSubspace"],
        ranks: Mapping[str, int],
        pairs: Mapping[str, HeldPairs],
        size: int,
        seed: int,
    ) -> None:
        self.subspaces = subspaces
        self.ranks = ranks
        self.mask: Tensor | None = None
        self._sites = sites
        # Made orthonormal once, in float64, which takes longer than what is done with them.
        self._bases = [_leading(s, max(ranks[name] for name in s.linears)) for s in subspaces]
        self._pairs = {name: _single(held) for name, held in pairs.items()}
        self._samples = [RowSample(size, seed) for _ in subspaces]
        self._inputs: list[Tensor] = []
        self._before: dict[str, tuple[Tensor, Tensor]] = {}

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Samples inputs in this block; set `mask` `(B, T)` before each forward pass. At its end outputs are taken."""
        hooks = [
            site.module.register_forward_pre_hook(partial(self._sample, index))
            for index, subspace in enumerate(self.subspaces)
            # The others read the same input.
            for site in self._sites[subspace.linears[0]]
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        for subspace, sample in zip(self.subspaces, self._samples, strict=True):
            rows = sample.rows()
            if rows is None:
                raise ValueError(f"the linear {subspace.linears[0]!r} did not run on any token that counts")
            self._inputs.append(rows.float())
        self._samples = []
        for name, module, inputs, basis in self._runs():
            self._before[name] = _outputs(module, inputs).cpu(), self._inside(name, module, inputs, basis)

    def deviations(self) -> dict[str, LinearDeviation]:
        """How the outputs differ now, by the linears' names."""
        found = {}
        for name, module, inputs, basis in self._runs():
            before, before_inside = self._before[name]
            change = _outputs(module, inputs).cpu() - before
            change_inside = self._inside(name, module, inputs, basis) - before_inside
            found[name] = LinearDeviation(
                output=_ratio(change, before),
                inside=_ratio(change_inside, before),
                outside=_ratio(change - change_inside, before),
                outside_energy=_ratio(inputs - inputs @ basis @ basis.T, inputs) ** 2,
                inputs=inputs.shape[0],
            )
        return found

    def _sample(self, index: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        rows = args[0].detach()
        mask = self.mask
        if mask is not None and rows.shape[:-1] == mask.shape:
            rows = rows[mask.to(rows.device) != 0]
        # Outside of the layers, inputs such as image features have no mask, and all of them count.
        rows = rows.reshape(-1, rows.shape[-1])
        if rows.shape[0]:
            self._samples[index].add(rows)

    def _runs(self) -> Iterator[tuple[str, nn.Module, Tensor, Tensor]]:
        """Each linear with its sampled inputs and the basis of its subspace, `(in, rank)`."""
        for subspace, inputs, basis in zip(self.subspaces, self._inputs, self._bases, strict=True):
            for name in subspace.linears:
                yield name, self._sites[name][0].module, inputs, basis[:, : self.ranks[name]]

    def _inside(self, name: str, module: nn.Module, inputs: Tensor, basis: Tensor) -> Tensor:
        """What of the outputs is held, without the bias, `(n, out)`."""
        bias = _outputs(module, inputs.new_zeros(1, inputs.shape[1])).cpu()
        if name not in self._pairs:
            return _outputs(module, inputs @ basis @ basis.T).cpu() - bias
        outputs, columns, mask = self._pairs[name]
        directions = basis[:, columns]
        action = (_outputs(module, directions.T).cpu() - bias) @ outputs
        return inputs @ directions @ (action * mask.T) @ outputs.T


def _leading(subspace: "InputSubspace", rank: int) -> Tensor:
    """As many directions of a subspace, `(in, rank)`, orthonormal, in float32 on the CPU."""
    return orthonormal_basis(subspace)[:, :rank].float()


def _single(pairs: HeldPairs) -> tuple[Tensor, Tensor, Tensor]:
    """[`HeldPairs.compact`] with its output directions in float32."""
    outputs, columns, mask = pairs.compact()
    return outputs.float(), columns, mask


@torch.no_grad()
def _outputs(module: nn.Module, inputs: Tensor) -> Tensor:
    """
    What a module makes of inputs, adapters included, in float32: two roundings to bfloat16, or products in TF32, would
    hide small changes.
    """
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    wide = {name: _wide(value) for name, value in state.items()}
    device = next(iter(wide.values())).device
    with full_precision_products(device):
        return functional_call(module, wide, (inputs.to(device),))


def _wide(value: Tensor) -> Tensor:
    # All processes that share the weight have to ask for it, as all of them make the certificate.
    value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.float() if value.is_floating_point() else value


def _ratio(part: Tensor, whole: Tensor) -> float:
    norm = float(torch.linalg.vector_norm(whole, dtype=torch.float64))
    return float(torch.linalg.vector_norm(part, dtype=torch.float64)) / norm if norm > 0 else 0.0
