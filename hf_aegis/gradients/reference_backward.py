"""The reference direction's way through the decoder layers: from the penalty of their outputs to their parameters."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from hf_aegis.gradients.forward_pass import ForwardPass
from hf_aegis.gradients.reference import ReferencePenalty


DualBackward = Literal["streaming", "two_pass"]
DUAL_BACKWARDS: tuple[DualBackward, ...] = ("streaming", "two_pass")


def stream_reference(
    forward: ForwardPass, index: int, number: int, add_reference: Callable[[str, Tensor], None]
) -> None:
    """
    Takes the reference from where it is down through product `number` of layer `index`, that included.

    Args:
        forward ([`ForwardPass`]): A forward pass whose layers' penalties were found.
        index, number (`int`): The layer, and which of its products.
        add_reference (`Callable[[str, Tensor], None]`): Takes parameters' names and reference gradients.
    """
    for upper, other in forward.products_from_above():
        if not forward.layers[upper].products[other].done:
            _differentiate(forward, upper, other, add_reference)
        if (upper, other) == (index, number):
            return


def _differentiate(
    forward: ForwardPass, index: int, number: int, add_reference: Callable[[str, Tensor], None]
) -> None:
    record = forward.layers[index]
    product = record.products[number]
    product.done = True
    cotangent, record.cotangent = record.cotangent, None
    if number == 0:
        assert record.penalty is not None
        own = record.penalty.cotangent(record.take_hidden(index))
        cotangent = own if cotangent is None else own.add_(cotangent)
    # The graph goes on in this layer, or with the output of the layer below.
    within = number + 1 < len(record.products)
    lower = forward.below(index)
    receiver = record if within else None if lower is None else forward.layers[lower]
    below = [] if receiver is None else [record.products[number + 1].output if within else receiver.outlet]
    inputs: list[Any] = [*below, *product.parameters.values()]
    if cotangent is None or not inputs:
        return
    gradients = torch.autograd.grad(
        [product.output], inputs, grad_outputs=[cotangent], retain_graph=True, allow_unused=True
    )
    if receiver is not None:
        receiver.cotangent = gradients[0] if within or gradients[0] is None else gradients[0][: receiver.rows]
    _add_all(list(product.parameters), gradients[len(below) :], add_reference)


def differentiate_penalties(
    forward: ForwardPass, penalty: ReferencePenalty, add_reference: Callable[[str, Tensor], None]
) -> None:
    """
    The same for all layers at once, by autograd of the whole penalty.

    Args:
        forward ([`ForwardPass`]): A forward pass whose layers' outputs were kept with their graph.
        penalty ([`ReferencePenalty`]): What is differentiated.
        add_reference (`Callable[[str, Tensor], None]`): Takes parameters' names and reference gradients.
    """
    parameters: dict[str, Parameter] = {}
    penalties = []
    with torch.enable_grad():
        for index, record in forward.layers.items():
            parameters.update(record.parameters)
            for product in record.products:
                product.done = True
            penalties.append(penalty.differentiable(index, record.take_hidden(index), record.mask, record.others))
    gradients = torch.autograd.grad(
        penalties,
        list(parameters.values()),
        grad_outputs=[torch.ones_like(penalty) for penalty in penalties],
        retain_graph=True,
        allow_unused=True,
    )
    _add_all(list(parameters), gradients, add_reference)


def _add_all(
    names: Sequence[str], gradients: Sequence[Tensor | None], add_reference: Callable[[str, Tensor], None]
) -> None:
    for name, gradient in zip(names, gradients, strict=True):
        if gradient is not None:
            add_reference(name, gradient)
