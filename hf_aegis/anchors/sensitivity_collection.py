"""Collects the sensitivity of a model's predictions to pairs of directions of its linear layers' weights."""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_aegis.anchors.linear_layers.names import find_linears
from hf_aegis.anchors.linear_layers.second_moments import (
    SecondMoments,
    SketchMatrices,
    leading_basis,
    masked_values,
    pack_sums,
    unpack_sums,
)
from hf_aegis.anchors.linear_layers.sensitivities import PairSensitivity
from hf_aegis.anchors.linear_layers.subspaces import InputSubspace, SubspaceOptions
from hf_aegis.anchors.partial_collection import Snapshot
from hf_aegis.anchors.passes import Passes
from hf_aegis.anchors.prediction_gradients import PredictionGradients
from hf_aegis.anchors.shares import Share
from hf_aegis.functional.product_precision import full_precision_products
from hf_aegis.json_files import require_keys


# Most numbers in the products of a chunk of samples: 128 MB in float32.
_CHUNK_NUMBERS = 2**25


def check_passes(batches: Iterable[Mapping[str, Any]]) -> None:
    """
    Refuses batches that can be iterated over only once.

    Raises:
        ValueError: if they are an iterator.
    """
    if isinstance(batches, Iterator):
        raise ValueError(
            f"sensitivities take several passes over the batches, found a {type(batches).__name__}, which ends after "
            "one: give a list or a DataLoader"
        )


def collect_sensitivities(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    layers: nn.ModuleList,
    subspaces: Mapping[str, InputSubspace],
    options: SubspaceOptions,
    *,
    tokens: str = "all",
    passes: Passes | None = None,
) -> dict[str, PairSensitivity]:
    """
    Runs the model forwards and backwards over the batches, twice: for the principal directions of the gradients at
    its linear layers' outputs, and for the sensitivity to each pair of one of them and one of the inputs'. The noise
    that gradients are made of differs between the two.

    Args:
        model (`nn.Module`): The model, wrapped or not.
        batches (`Iterable[Mapping[str, Any]]`): See [`ActivationAnchor.collect`]; iterated over twice.
        layers (`nn.ModuleList`): Its decoder layers.
        subspaces (`Mapping[str, InputSubspace]`): Of the linear layers' inputs.
        options ([`SubspaceOptions`]): How they were collected, and the sensitivities are to be.
        tokens (`str`, *optional*, defaults to `"all"`): The kind of tokens that count in the linear layers.
        passes ([`Passes`], *optional*): How the batches are gone over; all of them by default.

    Returns:
        `dict[str, PairSensitivity]`: by linear layer, on the CPU.

    Raises:
        ValueError: if no prediction counts in a batch, predictions do not depend on a linear layer, gradients are
            not finite, or all sensitivities are zero.
    """
    linears = find_linears(model, layers, options.modules)
    passes = passes or Passes()
    gradients = PredictionGradients(
        model, layers, linears, temperature=options.temperature, tokens=tokens, seed=options.seed, passes=passes
    )
    moments = OutputMoments(linears, options)
    gradients.run(batches, moments, "output_gradients")
    bases = {name: moments.basis(name, passes.share) for name in linears}
    products = PairProducts(subspaces, bases)
    num_samples = gradients.run(batches, products, "sensitivities")
    products.merge_over(passes.share)
    found = {name: products.sensitivity(name, num_samples) for name in linears}
    if not any(bool(pairs.sensitivities.any()) for pairs in found.values()):
        raise ValueError(
            f"the sensitivities of all {len(found)} linear layers are zero: at temperature {options.temperature} the "
            "model is certain of its predictions; a higher one keeps them from vanishing"
        )
    return found


class OutputMoments:
    """
    Second moments E[g gᵀ] of the gradients at linear layers' outputs, over the tokens that count.

    Args:
        linears (`Mapping[str, nn.Module]`): The linear layers.
        options ([`SubspaceOptions`]): `max_output_rank`, `dtype`, and which widths are sketched.
    """

    def __init__(self, linears: Mapping[str, nn.Module], options: SubspaceOptions):
        self.linears = linears
        self.options = dataclasses.replace(
            options, energy=1.0, min_rank=1, max_rank=options.max_output_rank, sensitivity=False
        )
        self._test_matrices = SketchMatrices(self.options)
        self._moments: dict[str, SecondMoments] = {}

    def see_input(self, name: str, input: Tensor, mask: Tensor | None) -> None:
        """Nothing to do."""

    def see_gradient(self, name: str, gradient: Tensor, mask: Tensor | None, num_samples: int) -> None:
        """Adds the gradient of a batch."""
        if name not in self._moments:
            width, device = gradient.shape[-1], gradient.device
            self._moments[name] = SecondMoments(width, device, self._test_matrices.matrix(width, device))
        self._moments[name].add(gradient, mask)

    def end_batch(self) -> None:
        """Nothing to do."""

    def snapshot(self) -> Snapshot:
        """The sums so far, see [`~anchors.partial_collection.Resumable`]."""
        return Snapshot(pack_sums(self._moments), {})

    def restore(self, snapshot: Snapshot) -> bool:
        """Goes on from earlier sums, see [`~anchors.partial_collection.Resumable`]."""
        devices = {name: next(module.parameters()).device for name, module in self.linears.items()}
        self._moments = unpack_sums(snapshot.tensors, devices, self._test_matrices)
        return True

    def basis(self, name: str, share: Share) -> Tensor:
        """
        The leading directions `(out, m)` of what was added by all processes, the same in each, on the CPU. The sums
        are let go, as they are larger.

        Raises:
            ValueError: if nothing counts, or gradients are not finite; the linear layer is named.
        """
        moments = self._moments.pop(name)
        moments.merge_over(share)

        def leading() -> Tensor:
            energies, basis, total, _ = moments.eigenpairs(f"gradients at the outputs of {name}")
            return leading_basis(energies, basis, total, self.options)

        return share.from_first(leading)


class PairProducts:
    r"""
    Sums over samples of \\((v_i^T (\sum_t g_t x_t^T) u_j)^2\\) for the linear layers' output directions v and input
    directions u: products over a batch in float32, or float64 where the model is, sums in float64.

    Args:
        subspaces (`Mapping[str, InputSubspace]`): With the bases u.
        bases (`Mapping[str, Tensor]`): The bases v `(out, m)`, by linear layer.
    """

    def __init__(self, subspaces: Mapping[str, InputSubspace], bases: Mapping[str, Tensor]):
        self._subspaces = {name: subspace for subspace in subspaces.values() for name in subspace.linears}
        self._bases = bases
        self._directions = _hash_of(subspaces, bases)
        self._placed: dict[str, Tensor] = {}
        self._inputs: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}

    def see_input(self, name: str, input: Tensor, mask: Tensor | None) -> None:
        """Keeps an input's components along the input directions until the backward pass, once for all that share."""
        subspace = self._subspaces[name]
        if (owner := subspace.linears[0]) not in self._inputs:
            self._inputs[owner] = self._turned(input, mask, f"inputs of {owner}", subspace.basis)

    def see_gradient(self, name: str, gradient: Tensor, mask: Tensor | None, num_samples: int) -> None:
        """Adds the squared products of a batch."""
        inputs = self._inputs[self._subspaces[name].linears[0]]
        outputs = self._turned(gradient, mask, f"outputs of {name}", self._bases[name])
        if outputs.shape[:-1].numel() % num_samples:
            raise ValueError(
                f"linear layer {name} runs on {outputs.shape[:-1].numel()} inputs, which do not divide between "
                f"{num_samples} samples"
            )
        outputs, inputs = (rows.reshape(num_samples, -1, rows.shape[-1]) for rows in (outputs, inputs))
        if name not in self._sums:
            # Apple's GPUs have no float64.
            dtype = torch.float32 if outputs.device.type == "mps" else torch.float64
            shape = outputs.shape[-1], inputs.shape[-1]
            self._sums[name] = torch.zeros(shape, dtype=dtype, device=outputs.device)
        # Sums of an earlier process come from a file.
        self._sums[name] = self._sums[name].to(outputs.device)
        chunk = max(1, _CHUNK_NUMBERS // self._sums[name].numel())
        with full_precision_products(outputs.device):
            for some_outputs, some_inputs in zip(outputs.split(chunk), inputs.split(chunk), strict=True):
                self._sums[name] += torch.bmm(some_outputs.mT, some_inputs).square().sum(dim=0)

    def end_batch(self) -> None:
        """Forgets the batch's inputs."""
        self._inputs.clear()

    def snapshot(self) -> Snapshot:
        """The sums so far, see [`~anchors.partial_collection.Resumable`]."""
        return Snapshot(dict(self._sums), {"directions_sha256": self._directions})

    def restore(self, snapshot: Snapshot) -> bool:
        """
        Goes on from earlier sums, see [`~anchors.partial_collection.Resumable`]. Those for other directions are
        refused: sums of squares in one basis do not tell those in another, and a basis that is computed again is the
        same on the same kind of machine only.
        """
        if (
            require_keys(snapshot.fields, {"directions_sha256": str}, "fields")["directions_sha256"]
            != self._directions
        ):
            return False
        for name, tensor in snapshot.tensors.items():
            known = name in self._bases and name in self._subspaces
            shape = (self._bases[name].shape[1], self._subspaces[name].rank) if known else None
            if tuple(tensor.shape) != shape or not tensor.is_floating_point():
                found = tensor.dtype, tuple(tensor.shape)
                raise ValueError(f"sums of {name} must be floating point of shape {shape}, found {found}")
        self._sums = dict(snapshot.tensors)
        return True

    def merge_over(self, share: Share) -> None:
        """Adds what other processes have summed up, in each of them."""
        for name in self._bases:
            # On the CPU in all of them: where a pass was over before this process began, they have been nowhere else.
            self._sums[name] = self._sums[name].cpu()
            share.sum_(self._sums[name])

    def sensitivity(self, name: str, num_samples: int) -> PairSensitivity:
        """
        The mean over so many samples, on the CPU, in float32.

        Raises:
            ValueError: if it is not finite; the linear layer is named.
        """
        return PairSensitivity(name, self._bases[name], (self._sums.pop(name) / num_samples).float().cpu())

    def _turned(self, vectors: Tensor, mask: Tensor | None, what: str, basis: Tensor) -> Tensor:
        """Components `(..., k)` of vectors along a basis; bases stay where the vectors are."""
        values = masked_values(vectors, mask)
        if what not in self._placed:
            self._placed[what] = basis.to(values.device, values.dtype)
        with full_precision_products(values.device):
            return values @ self._placed[what]


def _hash_of(subspaces: Mapping[str, InputSubspace], bases: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for basis in (*(subspace.basis for subspace in subspaces.values()), *bases.values()):
        digest.update(basis.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
