"""Hooks that reduce the inputs of linear layers to their second moments, and find out which layers share an input."""

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from tqdm.auto import tqdm

from hf_aegis.anchors.linear_layers.names import LAYERS_PREFIX, find_linears
from hf_aegis.anchors.linear_layers.second_moments import SecondMoments, SketchMatrices, pack_sums, unpack_sums
from hf_aegis.anchors.linear_layers.subspaces import InputSubspace, SubspaceOptions
from hf_aegis.anchors.partial_collection import Snapshot
from hf_aegis.anchors.shares import Share
from hf_aegis.hooks import removed_afterwards
from hf_aegis.json_files import require_keys


class LinearInputs:
    """
    Observes what the linear layers of a model are given. Layers that are given the same tensor (query, key and value
    projections; gate and up projections) share one sum, that of the first to run.

    Args:
        model (`nn.Module`):
            The model, wrapped or not.
        layers (`nn.ModuleList`):
            Its decoder layers.
        options ([`SubspaceOptions`]):
            How their inputs are summed, and which layers outside of the decoder layers are observed too.

    Raises:
        ValueError: if there are no such layers.
    """

    def __init__(self, model: nn.Module, layers: nn.ModuleList, options: SubspaceOptions):
        self.linears = find_linears(model, layers, options.modules)
        self.options = options
        self._test_matrices = SketchMatrices(options)
        self._statistics: dict[str, SecondMoments] = {}
        self._owners: dict[str, str] | None = None
        self._mask: Tensor | None = None
        self._tokens: torch.Size | None = None
        self._seen: dict[str, str] = {}
        # By identity and without keeping them: a tensor that is gone cannot be given to another layer.
        self._inputs = WeakIdKeyDictionary()

    def observes(self, module: nn.Module | None) -> bool:
        """Whether a module is one of the linear layers."""
        return any(linear is module for linear in self.linears.values())

    def attached(self) -> AbstractContextManager[None]:
        """Keeps the hooks on the linear layers for the duration of the block, whatever happens in it."""
        return removed_afterwards(
            module.register_forward_pre_hook(
                lambda _module, args, kwargs, name=name: self._observe(name, *args, **kwargs), with_kwargs=True
            )
            for name, module in self.linears.items()
        )

    def start_batch(self, mask: Tensor | None) -> None:
        """Forgets the last batch's inputs; `mask` `(B, T)` is the next one's."""
        self._mask, self._tokens = mask, None if mask is None else mask.shape
        self._seen.clear()
        self._inputs.clear()

    def end_batch(self, batch_index: int) -> None:
        """
        Checks what the hooks saw since [`~LinearInputs.start_batch`].

        Raises:
            ValueError: if a linear layer did not run, or shared its input with others than before.
        """
        silent = [name for name in self.linears if name not in self._seen]
        if silent:
            raise ValueError(f"batch {batch_index}: the linear layers {silent} did not run in the forward pass")
        if self._owners is None:
            self._owners = dict(self._seen)
        for name, owner in self._seen.items():
            if owner != self._owners[name]:
                raise ValueError(
                    f"batch {batch_index}: linear layer {name} shares its input with {owner}, but with "
                    f"{self._owners[name]} in the first batch: which layers share inputs must not change"
                )

    def subspaces(self, progress: bool = True, share: Share | None = None) -> dict[str, InputSubspace]:
        """
        The principal subspaces of everything seen, by the first linear layer of each.

        Args:
            progress (`bool`, *optional*, defaults to `True`): Shows a progress bar.
            share ([`Share`], *optional*): Of processes whose inputs are taken together; all get the same subspaces.

        Raises:
            ValueError: if no input of a linear layer counted, or its inputs are not finite; it is named. If layers
                share inputs in some processes that do not in others.
        """
        share = share or Share()
        groups: dict[str, list[str]] = {}
        for name, owner in (self._owners or {}).items():
            groups.setdefault(owner, []).append(name)
        if any(theirs != list(groups.items()) for theirs in share.gathered(list(groups.items()))):
            raise ValueError("which linear layers share inputs differs between the processes, and must not")
        subspaces = {}
        for owner, names in tqdm(groups.items(), desc="Decomposing inputs", unit="input", disable=not progress):
            # Sums are let go one by one, as they are larger than what is made of them.
            sums = self._statistics.pop(owner)
            sums.merge_over(share)
            subspaces[owner] = share.from_first(partial(sums.subspace, tuple(names), self.options))
        return subspaces

    def snapshot(self) -> Snapshot:
        """The sums so far, see [`~anchors.partial_collection.Resumable`]."""
        return Snapshot(pack_sums(self._statistics), {"owners": self._owners})

    def restore(self, snapshot: Snapshot) -> bool:
        """Goes on from earlier sums, see [`~anchors.partial_collection.Resumable`]."""
        devices = {name: next(module.parameters()).device for name, module in self.linears.items()}
        owners = require_keys(snapshot.fields, {"owners": dict}, "fields")["owners"]
        if not all(isinstance(owner, str) for owner in owners.values()):
            raise ValueError(f"key 'owners' must hold names of linear layers, found {owners}")
        self._statistics = unpack_sums(snapshot.tensors, devices, self._test_matrices)
        self._owners = owners
        return True

    def _observe(self, name: str, input: Tensor, *_args: Any, **_kwargs: Any) -> None:
        if name in self._seen:
            raise ValueError(f"linear layer {name} ran twice in one forward pass: its input would be ambiguous")
        mask = self._mask_for(name, input)
        owner = self._seen[name] = self._inputs.setdefault(input, name)
        if owner != name:
            return
        if name not in self._statistics:
            # Outside of inference mode, so that the sums are ordinary tensors.
            with torch.inference_mode(False):
                width, device = input.shape[-1], input.device
                test_matrix = self._test_matrices.matrix(width, device)
                self._statistics[name] = SecondMoments(width, device, test_matrix)
        self._statistics[name].add(input.detach(), mask)

    def _mask_for(self, name: str, input: Tensor) -> Tensor | None:
        inside = name.startswith(LAYERS_PREFIX)
        if inside and self._tokens is None and input.dim() == 3:
            self._tokens = input.shape[:-1]
        if input.shape[:-1] == self._tokens:
            return self._mask
        if inside:
            raise ValueError(
                f"linear layer {name} is given inputs of shape {tuple(input.shape)}, expected (batch, tokens, width) "
                f"with (batch, tokens) = {self._tokens and tuple(self._tokens)}, as all inside the decoder layers"
            )
        # Image features, for instance: nothing says that some of them should not count.
        return None
