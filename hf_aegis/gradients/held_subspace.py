"""The held subspace: linear layers go on acting on the anchored inputs as they did when training began."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_aegis.functional.subspace import rank_for_energy
from hf_aegis.gradients.freezing import freeze_unheld
from hf_aegis.gradients.held_pairs import HeldPairs, choose_pairs
from hf_aegis.gradients.held_weight import HeldWeight, local_rows
from hf_aegis.gradients.linear_sites import LinearSite, orthonormal_basis, sites_by_name, subspaces_of


if TYPE_CHECKING:
    from hf_aegis.anchors import ActivationAnchor, InputSubspace


class HeldSubspace:
    r"""
    Holds \\(W U = W_0 U =: C\\) for linear layers with weights \\(W\\), where the orthonormal columns of \\(U\\) span
    the principal directions of the layer's inputs on the anchored data. Called after each optimiser step, it does
    \\(W \leftarrow W - (W U - C)\, \mathrm{diag}(s)\, U^\top\\).

    With \\(s = 1\\) that is the nearest weight on the constraint, and \\(W x = W_0 x\\) for each \\(x\\) in the
    subspace: the layer's output is what it was, hence the next layer's input, and by induction the pre-trained
    function on the anchored data, for any number of steps, up to the energy outside of the subspaces. Optimiser and
    weight decay do not matter, as what they did inside of the subspace is undone. Relatives that project the gradient
    or the update: OWM (arXiv 1810.01256), GPM (arXiv 2103.09762), Adam-NSCL (arXiv 2103.07113).

    ```python
    held = HeldSubspace(model, anchor, energy=0.99)
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        held()
        optimizer.zero_grad()
    ```

    Weights that are frozen when this is made are left out. On a PEFT model, LoRA adapters \\(B A\\) are held by
    \\(A U = 0\\), with which the linear acts on the subspace as without them. LoRA's dropout takes inputs out of the
    subspace while training; in evaluation the constraint counts as it stands.

    With `sensitivity`, single pairs of an output and an input direction \\(v_i^\top W u_j\\) are held in place of
    whole input directions: those that the predictions on the anchored data are most sensitive to, wherever in the
    model they are. That leaves more of the weights free, but layers' outputs may change, and what is kept is kept as
    far as the sensitivities, which are of the model before training, foretell it.

    It may be made before or after FSDP2 shards the weights. Those that are sharded by rows are restored without
    communication, but for pairs (see [`HeldWeight`]), replicated ones alike in each process. A weight in bfloat16 or
    float16 keeps the constraint to its own rounding, which does not add up over steps. An optimiser that keeps float32
    copies of such weights writes its copy over the restored weight in the next step: what it did inside of the
    subspace adds up in the copy, though not in the weight as it is after each call.

    Args:
        model (`torch.nn.Module`):
            A Hugging Face model with a stack of decoder layers, wrapped or not.
        subspaces ([`ActivationAnchor`], or [`InputSubspace`]s):
            The anchor with the subspaces, or a mapping or an iterable of them.
        energy (`float` or `Mapping[str, float]`, *optional*):
            Share of the inputs' energy that is held, from 0 (nothing) to 1. Or shares by patterns of the linears'
            names, such as `"layers.0.*"`; the first pattern that fits decides. All directions that are stored where
            this says nothing, or asks for more than is stored.
        max_rank (`int`, *optional*):
            Bound on the number of directions for each linear.
        sensitivity (`float`, *optional*):
            Share of the predictions' sensitivity that is held, above 0 and at most 1: the pairs of the largest
            sensitivities, over all linears that train together, until they add up to it. The input directions are
            those that `energy` and `max_rank` leave, and the sum is over their pairs. Needs an anchor with
            sensitivities. By default whole input directions are held.
        softness (`float`, *optional*, defaults to `0.0`):
            With \\(\gamma > 0\\), direction \\(j\\) of energy \\(e_j\\) is brought back by the share
            \\(s_j = e_j / (e_j + \gamma \bar e)\\) of the way in each call, where \\(\bar e\\) is the mean energy per
            input dimension: strong directions firmly, weak ones hardly. 0 brings all of them back entirely.
        layers (`str` or `torch.nn.ModuleList`, *optional*):
            Where the decoder layers are, if they cannot be found.
        freeze (`bool`, *optional*, defaults to `True`):
            Freezes what else of the decoder would change the function; see [`freeze_unheld`]. A module before the
            decoder that trains without a subspace, such as a projector, is the caller's to freeze.
        every (`int`, *optional*, defaults to `1`):
            Restores in every n-th call only; `restore()` does so at once.

    Attributes:
        weights (`dict[str, HeldWeight]`): What is held, by name: that of the linear, with `.lora_A.<adapter>` added
            for adapters.
        ranks (`dict[str, int]`): Number of input directions for each linear that has a subspace; with `sensitivity`,
            of those that pairs are taken from.
        pairs (`dict[str, HeldPairs]`): With `sensitivity`, the pairs of each linear that trains.
        held_shares (`dict[str, float]`): For each linear that trains, the number of its held directions or pairs as a
            share of all that its weight has.
        frozen (`tuple[str, ...]`): Parameters that `freeze` froze.

    Raises:
        ValueError: If an argument is out of range; a pattern fits no linear; the subspaces do not fit the model; a
            basis is not orthonormal; a linear of the decoder layers trains without a subspace (with `freeze`);
            nothing is left to hold, or all sensitivities are zero; a weight is quantised or sharded by columns; an
            adapter is not a plain LoRA, or already acts on the subspace; `sensitivity` meets `softness`, adapters, or
            an anchor without sensitivities.
    """

    def __init__(
        self,
        model: nn.Module,
        subspaces: "ActivationAnchor | Mapping[str, InputSubspace] | Iterable[InputSubspace]",
        *,
        energy: float | Mapping[str, float] | None = None,
        max_rank: int | None = None,
        sensitivity: float | None = None,
        softness: float = 0.0,
        layers: str | nn.ModuleList | None = None,
        freeze: bool = True,
        every: int = 1,
    ) -> None:
        if max_rank is not None and max_rank < 1:
            raise ValueError(f"max_rank must be at least 1, found {max_rank}")
        if not 0 <= softness < float("inf"):
            raise ValueError(f"softness must be finite and not negative, found {softness}")
        if sensitivity is not None and not 0 < sensitivity <= 1:
            raise ValueError(f"sensitivity must be above 0 and at most 1, found {sensitivity}")
        if sensitivity is not None and softness:
            raise ValueError("softness is for whole input directions: it cannot be combined with sensitivity")
        if every < 1:
            raise ValueError(f"every must be at least 1, found {every}")
        groups = subspaces_of(subspaces)
        sites = sites_by_name(model, groups, layers)
        self.every = every
        self.softness = softness
        self.frozen: tuple[str, ...] = ()
        self.ranks = subspace_ranks(groups, energy, max_rank)
        self.pairs: dict[str, HeldPairs] = {}
        if sensitivity is not None:
            self.pairs = choose_pairs(subspaces, sites, groups, self.ranks, sensitivity)
        self.held_shares: dict[str, float] = {}
        self.weights: dict[str, HeldWeight] = {}
        self._left_out: dict[str, nn.Module] = {}
        self._calls = 0
        for group in groups:
            basis = orthonormal_basis(group)[:, : max(self.ranks[name] for name in group.linears)]
            # Linears that read one input share the memory of its basis.
            bases: dict[tuple[torch.device, torch.dtype], Tensor] = {}
            for site in (site for name in group.linears for site in sites[name]):
                self._hold(site, group, basis, bases)
        if not self.weights:
            raise ValueError(
                f"nothing to hold: of {len(sites)} linears with a subspace none trains, or their energy is 0"
            )
        if freeze:
            self.frozen = freeze_unheld(model, groups, layers)

    def __call__(self) -> None:
        """
        Restores the constraint, in every n-th call. To be called after each optimiser step.

        Raises:
            RuntimeError: If a weight has other rows than it had, or one that was frozen trains now.
        """
        self._calls += 1
        if self._calls % self.every == 0:
            self.restore()

    def restore(self) -> None:
        """Restores the constraint now."""
        for name, linear in self._left_out.items():
            if linear.weight.requires_grad:
                raise RuntimeError(f"{name} was frozen when the subspaces were taken hold of, and trains now")
        for weight in self.weights.values():
            weight.restore()

    def deviation(self) -> dict[str, float]:
        r"""
        How far each weight is from its constraint: \\(\|W U - C\| / \|C\|\\), or \\(\|A U\| / \|A\|\\) for an adapter;
        over this process's rows where the weight is sharded. With `sensitivity`, over the held pairs and all rows, for
        which all processes have to call it.
        """
        return {name: weight.deviation() for name, weight in self.weights.items()}

    def _hold(
        self,
        site: LinearSite,
        group: "InputSubspace",
        whole: Tensor,
        bases: dict[tuple[torch.device, torch.dtype], Tensor],
    ) -> None:
        rank, pairs = self.ranks[site.name], self.pairs.get(site.name)
        if not rank:
            self.held_shares |= {site.name: 0.0} if site.trains else {}
            return
        parts = {site.name: site.linear}
        if site.has_adapters:
            parts |= {f"{site.name}.lora_A.{name}": a for name, a in _adapters(site).items()}
        for name, linear in parts.items():
            # An adapter whose A is frozen changes the function by its B.
            if not linear.weight.requires_grad and (
                linear is site.linear or not _matrix_b(site, name).weight.requires_grad
            ):
                self._left_out[name] = linear
                continue
            self.held_shares[site.name] = _held_share(site.linear, rank, pairs)
            if not self.held_shares[site.name]:
                continue
            rows = local_rows(linear)
            place = rows.device, torch.promote_types(rows.dtype, torch.float32)
            if place not in bases:
                bases[place] = whole.to(*place)
            basis = bases[place][:, :rank]
            share = None if self.softness == 0 else _shares(group, self.softness)[:rank].to(*place)
            if pairs is not None:
                output_basis, columns, mask = pairs.compact()
                held = HeldWeight(
                    linear,
                    basis[:, columns.to(basis.device)],
                    share=None if bool(mask.all()) else mask.to(basis.device),
                    output_basis=output_basis.to(*place),
                )
            elif linear is site.linear:
                held = HeldWeight(linear, basis, share=share)
            else:
                held = self._adapter(site, name, linear, basis, share)
            self.weights[_unused(name, self.weights)] = held

    def _adapter(
        self, site: LinearSite, name: str, linear: nn.Module, basis: Tensor, share: Tensor | None
    ) -> HeldWeight:
        """Holds A U = 0, and starts there where that does not change the function."""
        held = HeldWeight(linear, basis, basis.new_zeros(local_rows(linear).shape[0], basis.shape[1]), share)
        idle = not bool(local_rows(_matrix_b(site, name)).any())
        tolerance = max(1e-3, 4 * torch.finfo(local_rows(linear).dtype).eps)
        if idle:
            HeldWeight(linear, basis, held.target).restore()
        elif share is None and held.deviation() > tolerance:
            raise ValueError(
                f"{name} already changes what the linear does on the subspace (B is not zero): merge the adapter "
                "into the model first, or start a new one with B = 0"
            )
        return held


def subspace_ranks(
    subspaces: Iterable["InputSubspace"],
    energy: float | Mapping[str, float] | None = None,
    max_rank: int | None = None,
) -> dict[str, int]:
    """
    How many directions [`HeldSubspace`] holds of each linear's inputs, or takes pairs from, by the linear's name.
    Arguments are its own.

    Raises:
        ValueError: If a share of energy is out of range, or a pattern fits no linear.
    """
    groups = list(subspaces)
    energies = _energies(energy, [name for group in groups for name in group.linears])
    return {name: _rank(group, energies[name], max_rank) for group in groups for name in group.linears}


def _adapters(site: LinearSite) -> dict[str, nn.Module]:
    """The matrices A of the LoRA adapters on a linear, by the adapters' names."""
    module: Any = site.module
    adapters = getattr(module, "lora_A", None)
    if not isinstance(adapters, nn.ModuleDict):
        raise ValueError(f"{site.name}: cannot hold a {type(module).__name__}, only LoRA adapters on a linear")
    if getattr(module, "lora_variant", None):
        raise ValueError(f"{site.name}: cannot hold variants of LoRA such as DoRA, only plain LoRA")
    return dict(adapters.items())


def _matrix_b(site: LinearSite, name: str) -> Any:
    """The matrix B that goes with the adapter's matrix A of this name."""
    module: Any = site.module
    return module.lora_B[name.rpartition(".")[2]]


def _energies(energy: float | Mapping[str, float] | None, names: list[str]) -> dict[str, float | None]:
    """The share of energy to hold of each linear's inputs; `None` for all that is stored."""
    patterns: Mapping[str, float | None] = energy if isinstance(energy, Mapping) else {"*": energy}
    for pattern, value in patterns.items():
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"energy must be from 0 to 1, found {value} for {pattern!r}")
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"energy: the pattern {pattern!r} fits none of the linears with a subspace: {names}")
    return {name: next((e for pattern, e in patterns.items() if fnmatchcase(name, pattern)), None) for name in names}


def _rank(group: "InputSubspace", energy: float | None, max_rank: int | None) -> int:
    if energy == 0:
        return 0
    stored = group.basis.shape[1]
    bound = stored if max_rank is None else max_rank
    if energy is None:
        return min(stored, bound)
    return rank_for_energy(group.energies, group.total_energy, energy, 1, bound)


def _held_share(linear: Any, rank: int, pairs: HeldPairs | None) -> float:
    width, outputs = linear.in_features, linear.out_features
    return rank / width if pairs is None else int(pairs.mask.sum()) / (width * outputs)


def _shares(group: "InputSubspace", softness: float) -> Tensor:
    """How much of the way each direction is brought back, `(k,)` in float64."""
    energies = group.energies.detach().cpu().double()
    whole = energies + softness * group.total_energy / group.basis.shape[0]
    return energies / whole.clamp(min=torch.finfo(whole.dtype).tiny)


def _unused(name: str, taken: Mapping[str, Any]) -> str:
    """A name of its own for each of the copies that PEFT made of a linear."""
    return name if name not in taken else _unused(f"{name}'", taken)
