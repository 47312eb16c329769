"""What the routers of a model did in its last forward pass."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_aegis.functional.expert_routing import load_balance_loss, routing_entropy, token_mean


@dataclass(frozen=True)
class RoutingRecord:
    r"""
    What one layer's router did with the tokens of one forward pass.

    Attributes:
        probabilities (`Tensor` of shape `(..., n_s)`): Of each token, with gradient.
        load (`Tensor` of shape `(n_s,)`): Share of tokens that each expert got; sums to `top_k`.
        mask (`Tensor` of shape `(...)`, *optional*): Which tokens count; by default all do.
    """

    probabilities: Tensor
    load: Tensor
    mask: Tensor | None = None

    def balance_loss(self) -> Tensor:
        r"""\\(n_s \sum_j f_j P_j\\), see [`load_balance_loss`]; with gradient."""
        return load_balance_loss(self.load, token_mean(self.probabilities, self.mask))

    def probability(self) -> Tensor:
        """Mean probability of each expert `(n_s,)`, without gradient."""
        return token_mean(self.probabilities.detach(), self.mask)

    def entropy(self) -> Tensor:
        """Mean entropy of the tokens' routing, in nats, without gradient."""
        return routing_entropy(self.probabilities.detach(), self.mask)


class RoutingLog:
    """
    Collects the routing of a model's layers in training, one forward pass at a time: it is cleared when the model is
    called again. Of a layer that runs more than once in a forward pass the last run counts: records of parts that are
    called by themselves would pile up otherwise. What a gradient checkpoint recomputes in the backward pass is not
    new, and not noted.

    Attributes:
        records (`dict[tuple[str, str], RoutingRecord]`): By name of the layer and of the adapter.
    """

    def __init__(self) -> None:
        self.records: dict[tuple[str, str], RoutingRecord] = {}
        self._mask: Tensor | None = None
        self._handle: RemovableHandle | None = None

    def follow(self, model: nn.Module) -> None:
        """Begins anew whenever `model` is called, and reads the `attention_mask` that it is called with."""
        self._handle = model.register_forward_pre_hook(self._on_forward, with_kwargs=True)

    def unfollow(self) -> None:
        """Takes the hook off the model."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self._clear()

    def note(self, layer: str, adapter: str, probabilities: Tensor, selected: Tensor) -> None:
        """
        Notes one layer's routing. What is computed here stays out of the graph: a checkpointed layer must do the same
        in the backward pass, when the mask may be another batch's.

        Args:
            layer, adapter (`str`): Their names.
            probabilities (`Tensor` of shape `(..., n_s)`): Of each token.
            selected (`Tensor` of shape `(..., n_s)`): Ones and zeros.
        """
        if _in_backward():
            return
        mask = self._mask
        if mask is not None and mask.shape != probabilities.shape[:-1]:
            # These are not the model's tokens, but an image's patches for instance.
            mask = None
        with torch.no_grad():
            load = token_mean(selected, mask)
        self.records[layer, adapter] = RoutingRecord(probabilities, load, mask)

    def _on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _in_backward():
            return
        self._clear()
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            self._mask = mask

    def _clear(self) -> None:
        self.records.clear()
        self._mask = None

    def __getstate__(self) -> dict[str, Any]:
        # Records hold a graph, which can be neither copied nor pickled.
        return {**self.__dict__, "records": {}, "_mask": None}


def _in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
