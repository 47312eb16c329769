"""Reading the autograd graph between the outputs of two neighbouring layers."""

from collections.abc import Container, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.nn import Parameter


class LayerLeakError(RuntimeError):
    """A layer's output depends on a lower layer by another way than that layer's hidden output."""


class LostGradientError(RuntimeError):
    """A loss was differentiated, but no gradient came back to the decoder layers that ran."""


@dataclass(frozen=True)
class GraphSegment:
    """
    The part of an autograd graph that computes one layer's output from the output of the layer below.

    Attributes:
        nodes (`list[torch.autograd.graph.Node]`): Its backward nodes, leaves excluded.
        parameters (`dict[str, torch.nn.Parameter]`): Trainable parameters that it uses, by name.
        boundaries (`set[torch.autograd.graph.Node]`): Nodes of other layers' outputs at which it ends.
    """

    nodes: list[Node]
    parameters: dict[str, Parameter]
    boundaries: set[Node]


def walk_segment(output: GradientEdge, boundaries: Container[Node], names: Mapping[int, str]) -> GraphSegment:
    """
    Collects the graph above the outputs of other layers.

    Args:
        output (`torch.autograd.graph.GradientEdge`): The layer's hidden output.
        boundaries (`Container[Node]`): Nodes that produced the outputs of other layers, where the walk ends.
        names (`Mapping[int, str]`): `id` of each trainable parameter of the model, with its name.

    Returns:
        [`GraphSegment`]
    """
    seen: set[Node] = {output.node}
    stack: list[Node] = [output.node]
    nodes: list[Node] = []
    parameters: dict[str, Parameter] = {}
    reached: set[Node] = set()
    while stack:
        node = stack.pop()
        if node in boundaries:
            reached.add(node)
            continue
        children = node.next_functions
        if not children:
            variable: Tensor | None = getattr(node, "variable", None)
            if variable is not None:  # an AccumulateGrad node: a leaf
                if (name := names.get(id(variable))) is not None:
                    assert isinstance(variable, Parameter)
                    parameters[name] = variable
                continue
        nodes.append(node)
        for child, _ in children:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)
    return GraphSegment(nodes, parameters, reached)
