"""
Activation checkpointing whose single recomputation serves two backward passes.

PyTorch's non-reentrant checkpoint recomputes once per backward call, so the two vector-Jacobian products of a dual
backward would recompute every layer twice. Here a segment's saved tensors are recomputed when the first product asks
for them, kept for the second one, and dropped one by one as the second one uses them.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states


class RecomputeMismatchError(RuntimeError):
    """The recomputation of a layer saved other tensors than its forward pass did."""


class _StopRecomputationError(Exception):
    """Ends a recomputation once every tensor that the backward pass needs is there."""


class AmbientState:
    """
    Random-number and autocast state of a forward pass, to be restored around its recomputation.

    Args:
        arguments (`tuple`): The arguments of the forward pass; they tell the devices.
    """

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        devices = {a.device.type for a in arguments if isinstance(a, Tensor)} | {"cpu"}
        self.autocast = [
            (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
            for device in sorted(devices)
            if torch.amp.is_autocast_available(device)
        ]
        self.autocast_cache = torch.is_autocast_cache_enabled()
        self.cpu_state = torch.get_rng_state()
        self.device_ids, self.device_states = get_device_states(*arguments)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """A context with that state; afterwards everything is as it was."""
        with contextlib.ExitStack() as stack:
            for device, dtype, enabled in self.autocast:
                stack.enter_context(torch.autocast(device, dtype, enabled, self.autocast_cache))
            stack.enter_context(torch.random.fork_rng(devices=self.device_ids))
            torch.set_rng_state(self.cpu_state)
            if self.device_ids:
                set_device_states(self.device_ids, self.device_states)
            yield


def refuse_reentrant(index: int, layer: nn.Module) -> None:
    """
    Refuses checkpointing that `torch.autograd.grad` cannot go through, or that cannot be differentiated twice.

    Raises:
        ValueError: If decoder layer `index` is checkpointed with `use_reentrant=True`.
    """
    function = getattr(layer, "_gradient_checkpointing_func", None)
    if getattr(layer, "gradient_checkpointing", False) and getattr(function, "keywords", {}).get("use_reentrant"):
        raise ValueError(
            f"decoder layer {index} is checkpointed with use_reentrant=True and cannot be differentiated twice; "
            'pass gradient_checkpointing_kwargs={"use_reentrant": False}'
        )


class SharedRecompute:
    """
    A drop-in for the checkpoint function of `transformers`' layers: `layer._gradient_checkpointing_func`.

    Args:
        keep (`Callable[[], bool]`):
            Asked whenever backward reads a saved tensor. `True` means that a further pass will read it again, so the
            recomputed tensor stays; `False` means that this is the last reader.
    """

    def __init__(self, keep: Callable[[], bool]) -> None:
        self.keep = keep
        self._replaced: list[tuple[nn.Module, Any]] = []

    def take_over(self, layer: nn.Module) -> None:
        """Takes the place of a checkpointed layer's own function."""
        self._replaced.append((layer, layer._gradient_checkpointing_func))
        layer._gradient_checkpointing_func = self  # type: ignore[assignment]

    def give_back(self) -> None:
        """Gives all layers their own functions back."""
        for layer, function in self._replaced:
            layer._gradient_checkpointing_func = function
        self._replaced.clear()

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Runs `function(*arguments)` without keeping what its backward pass needs."""
        if not torch.is_grad_enabled():
            return function(*arguments)
        frame = _Frame(function, arguments)
        with torch.autograd.graph.saved_tensors_hooks(frame.pack, lambda index: frame.unpack(index, self.keep())):
            return function(*arguments)


class _Frame:
    """What one checkpointed call needs to be recomputed, and what was recomputed."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.function = function
        self.arguments = arguments
        self.ambient = AmbientState(arguments)
        self.signatures: list[tuple[torch.Size, torch.dtype]] = []
        self.recomputed: dict[int, Tensor] | None = None

    def pack(self, tensor: Tensor) -> int:
        self.signatures.append((tensor.shape, tensor.dtype))
        return len(self.signatures) - 1

    def unpack(self, index: int, keep: bool) -> Tensor:
        if self.recomputed is None:
            self.recomputed = self._recompute()
        try:
            return self.recomputed[index] if keep else self.recomputed.pop(index)
        except KeyError:
            raise RuntimeError(
                "A checkpointed layer was differentiated again after its last backward pass. Pass the layer's inputs "
                "through a new forward pass first."
            ) from None

    def _recompute(self) -> dict[int, Tensor]:
        recomputed: dict[int, Tensor] = {}

        def collect(tensor: Tensor) -> None:
            index = len(recomputed)
            if index >= len(self.signatures) or (tensor.shape, tensor.dtype) != self.signatures[index]:
                expected = self.signatures[index] if index < len(self.signatures) else "no further tensor"
                raise RecomputeMismatchError(
                    f"Recomputing a checkpointed layer saved tensor {index} as {(tensor.shape, tensor.dtype)}, its "
                    f"forward pass had {expected}. The layer's forward must not depend on state that changes."
                )
            recomputed[index] = tensor.detach()
            if len(recomputed) == len(self.signatures):
                raise _StopRecomputationError

        def refuse(_: Any) -> Tensor:
            raise RuntimeError("a backward pass ran inside a checkpointed layer's recomputation")

        with (
            self.ambient.restored(),
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(collect, refuse),
            contextlib.suppress(_StopRecomputationError),
        ):
            self.function(*self.arguments)
        if len(recomputed) != len(self.signatures):
            raise RecomputeMismatchError(
                f"Recomputing a checkpointed layer saved {len(recomputed)} tensors, its forward pass saved "
                f"{len(self.signatures)}. The layer's forward must not depend on state that changes."
            )
        return recomputed
