"""Backpropagates random projections of a model's predictions to the outputs of its linear layers."""

import hashlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_aegis.anchors.collection import (
    evaluation_mode,
    forward_inputs,
    input_device,
    output_embeddings,
    without_cache,
)
from hf_aegis.anchors.decoder_layers import unwrap_model
from hf_aegis.anchors.fingerprint import decoder_config
from hf_aegis.anchors.partial_collection import Resumable, Snapshot
from hf_aegis.anchors.passes import Passes
from hf_aegis.anchors.token_kinds import find_image_token_id, select_tokens
from hf_aegis.functional.gauss_newton import predictive_cotangent
from hf_aegis.hooks import removed_afterwards
from hf_aegis.json_files import require_keys


# What a causal-LM loss leaves out.
_IGNORED = -100


class LinearObserver(Resumable, Protocol):
    """What is told of a linear layer in one forward and backward pass, and sums it up."""

    def see_input(self, name: str, input: Tensor, mask: Tensor | None) -> None:
        """A linear layer was given `input` `(..., in)`; `mask` `(...)` says which of it count, all by default."""

    def see_gradient(self, name: str, gradient: Tensor, mask: Tensor | None, num_samples: int) -> None:
        """At its output the gradient is `gradient` `(..., out)`; samples are in order along the first dimension."""

    def end_batch(self) -> None:
        """The backward pass is over."""


class PredictionGradients:
    r"""
    Runs a model over batches, and sends the gradients of random projections of its predictions, see
    [`~functional.gauss_newton.predictive_cotangent`], back to its linear layers' outputs. No parameter gets a
    gradient: the graph begins at the first of the linear layers. The model is left as it was found.

    Predictions count where the batch has a label, as in a causal-LM loss: those of the token before each label that is
    not -100, where both tokens are attended. What the labels are does not matter. In a batch without labels those of
    all attended tokens count.

    Args:
        model (`nn.Module`): The model, wrapped or not.
        layers (`nn.ModuleList`): Its decoder layers.
        linears (`Mapping[str, nn.Module]`): The linear layers, see [`~anchors.linear_layers.names.find_linears`].
        temperature (`float`): Of the predictions.
        tokens (`str`): The kind of tokens that count in the linear layers.
        seed (`int`): Of the noise, which also depends on the pass and on the batch's number among all: it is the same
            whichever process has the batch, and whatever was interrupted before.
        passes ([`Passes`], *optional*): How the batches are gone over; all of them by default.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: nn.ModuleList,
        linears: Mapping[str, nn.Module],
        *,
        temperature: float,
        tokens: str = "all",
        seed: int = 0,
        passes: Passes | None = None,
    ):
        self.model = model
        self.layers = layers
        self.linears = linears
        self.temperature = temperature
        self.tokens = tokens
        self.passes = passes or Passes()
        self._seed = seed
        self._batch_seed = 0
        self._image_token_id = None if tokens == "all" else find_image_token_id(model)
        self._mask: Tensor | None = None
        self._num_samples = 0
        self._ran: set[str] = set()
        self._reached: set[str] = set()
        head = output_embeddings(model)
        takes_positions = "logits_to_keep" in inspect.signature(unwrap_model(model).forward).parameters
        # A head that is observed has to see all tokens, as the mask has them.
        self._keeps_some = takes_positions and not any(linear is head for linear in linears.values())

    def run(self, batches: Iterable[Mapping[str, Any]], observer: LinearObserver, name: str) -> int:
        """
        One pass over the batches.

        Args:
            batches (`Iterable[Mapping[str, Any]]`): Forward arguments, and labels if predictions count at some only.
            observer ([`LinearObserver`]): Is told of each linear layer's inputs and output gradients.
            name (`str`): Of the pass.

        Returns:
            `int`: number of samples, of all processes.

        Raises:
            ValueError: if a batch has no predictions that count, the model gives no logits, or its predictions do not
                depend on a linear layer.
        """
        device = input_device(self.model)
        counted = _CountedSamples(observer)
        config = decoder_config(self.model, self.layers)
        # Evaluation mode also keeps the layers of transformers from recomputing themselves in the backward pass.
        with evaluation_mode(self.model), without_cache(config), _frozen(self.model), self._attached(observer):
            for number, batch in self.passes.over(batches, name, counted):
                inputs = forward_inputs(batch, device, number)
                attended = inputs.get("attention_mask")
                counts = _counting_predictions(batch.get("labels"), inputs)
                if counts is not None and not bool(counts.any()):
                    raise ValueError(f"batch {number}: the labels and the attention mask leave no prediction to count")
                self._mask = select_tokens(attended, inputs.get("input_ids"), self.tokens, self._image_token_id)
                self._batch_seed = noise_seed(self._seed, name, number)
                counted.num_samples += self._backpropagate(inputs, counts, number)
                observer.end_batch()
        return sum(self.passes.share.gathered(counted.num_samples))

    def _backpropagate(self, inputs: dict[str, Any], counts: Tensor | None, batch_index: int) -> int:
        """Runs one batch forwards and backwards; returns its number of samples."""
        self._ran.clear()
        self._reached.clear()
        inputs.pop("logits_to_keep", None)
        if counts is not None and self._keeps_some:
            # The language-model head is costly, and most predictions do not count.
            positions = inputs["logits_to_keep"] = counts.any(dim=0).nonzero()[:, 0]
            counts = counts[:, positions]
        with torch.enable_grad():
            logits = getattr(self.model(**inputs), "logits", None)
            if not isinstance(logits, Tensor):
                raise ValueError(f"{type(unwrap_model(self.model)).__name__} gives no logits: sensitivities need them")
            if counts is not None and counts.shape != logits.shape[:-1]:
                raise ValueError(
                    f"batch {batch_index}: the logits have shape {tuple(logits.shape)}, expected one row for each "
                    f"entry of the labels or the attention mask, {tuple(counts.shape)}"
                )
            chosen = logits.flatten(0, 1) if counts is None else logits[counts.to(logits.device)]
        cotangent = predictive_cotangent(chosen, self._noise(chosen), self.temperature)
        self._num_samples = logits.shape[0]
        if chosen.requires_grad:
            chosen.backward(cotangent.to(chosen.dtype))
        if silent := [name for name in self.linears if name not in self._reached]:
            raise ValueError(f"batch {batch_index}: the predictions do not depend on the linear layers {silent}")
        return self._num_samples

    def _noise(self, like: Tensor) -> Tensor:
        generator = torch.Generator(like.device).manual_seed(self._batch_seed)
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return torch.randn(like.shape, generator=generator, dtype=dtype, device=like.device)

    def _attached(self, observer: LinearObserver) -> AbstractContextManager[None]:
        def observe(name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if name in self._ran:
                raise ValueError(f"linear layer {name} ran twice for one batch: turn activation checkpointing off")
            self._ran.add(name)
            input = args[0] if args else kwargs["input"]
            mask = self._mask if self._mask is not None and input.shape[:-1] == self._mask.shape else None
            observer.see_input(name, input.detach(), mask)

            def passed(gradient: Tensor) -> None:
                self._reached.add(name)
                observer.see_gradient(name, gradient, mask, self._num_samples)

            if output.requires_grad:
                output.register_hook(passed)
                return None
            # Nothing trains below, so that the graph begins here. The copy may be changed in place, as a leaf may not.
            start = output.detach().requires_grad_().clone()
            start.register_hook(passed)
            return start

        return removed_afterwards(
            module.register_forward_hook(partial(observe, name), with_kwargs=True)
            for name, module in self.linears.items()
        )


class _CountedSamples:
    """What an observer sums up, and how many samples it is of."""

    def __init__(self, observer: LinearObserver):
        self.observer = observer
        self.num_samples = 0

    def snapshot(self) -> Snapshot:
        """The observer's sums, and the number."""
        tensors, fields = self.observer.snapshot()
        return Snapshot(tensors, {**fields, "num_samples": self.num_samples})

    def restore(self, snapshot: Snapshot) -> bool:
        """Goes on from earlier sums, if the observer does."""
        if not self.observer.restore(snapshot):
            return False
        self.num_samples = require_keys(snapshot.fields, {"num_samples": int}, "fields")["num_samples"]
        return True


def noise_seed(seed: int, name: str, number: int) -> int:
    """The seed of the noise for one batch of a pass: 63 bits that are as good as independent of all others'."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}/{number}".encode()).digest()[:8]) >> 1


def _counting_predictions(labels: Tensor | None, inputs: Mapping[str, Any]) -> Tensor | None:
    """Where predictions count, `(B, T)`; `None` for everywhere, in inputs that do not tell their tokens."""
    attended, tokens = inputs.get("attention_mask"), inputs.get("input_ids")
    keep = None if attended is None else attended != 0
    if labels is not None:
        counts = labels[:, 1:] != _IGNORED
        if keep is not None:
            counts = counts.to(keep.device) & keep[:, 1:] & keep[:, :-1]
        # The last token's prediction has no label.
        return nn.functional.pad(counts, (0, 1), value=False)
    return torch.ones_like(tokens, dtype=torch.bool) if keep is None and isinstance(tokens, Tensor) else keep


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient for the duration of the block."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
