"""What the autograd graph of a shielded layer calls."""

import weakref
from typing import TYPE_CHECKING

import torch

from hf_aegis.gradients.forward_pass import ForwardPass


if TYPE_CHECKING:
    from hf_aegis.gradients.shield import GradientShield


class Phase:
    """Whether the gradients under way are those of the reference."""

    is_reference = False


def in_backward() -> bool:
    """Whether this thread runs autograd's backward pass."""
    return torch._C._current_graph_task_id() != -1


class LayerEntry:
    """
    Called by autograd before each node of a layer's product. The graph must not own the records, which own the graph.
    """

    __slots__ = ("_forward", "_index", "_number", "_shield")

    def __init__(self, shield: "GradientShield", forward: ForwardPass, index: int, number: int) -> None:
        self._shield = weakref.ref(shield)
        self._forward = weakref.ref(forward)
        self._index = index
        self._number = number

    def __call__(self, gradients: object) -> None:
        forward = self._forward()
        if forward is None:
            raise RuntimeError(
                "a backward pass went through decoder layers whose shield no longer watches them: run forward and "
                "backward inside one `with shield:` block, and each backward pass once"
            )
        if not forward.layers[self._index].products[self._number].done:
            shield = self._shield()
            assert shield is not None, "a shield owns its forward passes"
            shield.enter_layer(forward, self._index, self._number)
