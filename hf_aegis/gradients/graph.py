"""Reading the autograd graph between the outputs of two neighbouring layers."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.nn import Parameter


class LayerLeakError(RuntimeError):
    """A layer's output depends on a lower layer by another way than that layer's hidden output."""


@dataclass(frozen=True)
class GraphSegment:
    """
    The part of an autograd graph that computes one layer's output from the output of the layer below.

    Attributes:
        nodes (`list[torch.autograd.graph.Node]`): Its backward nodes, leaves excluded.
        parameters (`dict[str, torch.nn.Parameter]`): Trainable parameters that it uses, by name.
        foreign_boundaries (`list[int]`): Indices of other layers' outputs that it reads directly.
    """

    nodes: list[Node]
    parameters: dict[str, Parameter]
    foreign_boundaries: list[int]


def walk_segment(
    output: GradientEdge, boundaries: Mapping[Node, int], lower: int | None, names: Mapping[int, str]
) -> GraphSegment:
    """
    Collects the graph above the output of the layer below.

    Args:
        output (`torch.autograd.graph.GradientEdge`): The layer's hidden output.
        boundaries (`Mapping[Node, int]`): Nodes that produced the outputs of the layers below, with their indices.
        lower (`int`, *optional*): Index of the layer below; `None` for the lowest one.
        names (`Mapping[int, str]`): `id` of each trainable parameter of the model, with its name.

    Returns:
        [`GraphSegment`]
    """
    seen: set[Node] = {output.node}
    stack: list[Node] = [output.node]
    nodes: list[Node] = []
    parameters: dict[str, Parameter] = {}
    foreign: set[int] = set()
    while stack:
        node = stack.pop()
        boundary = boundaries.get(node)
        if boundary is not None:
            if boundary != lower:
                foreign.add(boundary)
            continue
        variable: Tensor | None = getattr(node, "variable", None)
        if variable is not None:  # an AccumulateGrad node: a leaf
            if (name := names.get(id(variable))) is not None:
                assert isinstance(variable, Parameter)
                parameters[name] = variable
            continue
        nodes.append(node)
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)
    return GraphSegment(nodes, parameters, sorted(foreign))
