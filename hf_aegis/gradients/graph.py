"""Reading the autograd graph between the outputs of two neighbouring layers."""

from collections import Counter
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


@dataclass(frozen=True)
class GraphPiece:
    """
    A stretch of a layer's graph that everything below it is reached through.

    Attributes:
        output (`torch.autograd.graph.GradientEdge`): Where it begins: the layer's output, or a bottleneck below it.
        nodes (`list[torch.autograd.graph.Node]`): Its backward nodes, leaves excluded.
        parameters (`dict[str, torch.nn.Parameter]`): Trainable parameters that it uses, by name.
    """

    output: GradientEdge
    nodes: list[Node]
    parameters: dict[str, Parameter]


def split_at_bottlenecks(output: GradientEdge, segment: GraphSegment, names: Mapping[int, str]) -> list[GraphPiece]:
    """
    Cuts a layer's graph where all of its branches meet again, as they do on the residual stream between attention and
    feed-forward block, so that one piece can be differentiated, and freed, before the next.

    Args:
        output (`torch.autograd.graph.GradientEdge`): The layer's hidden output.
        segment ([`GraphSegment`]): What [`walk_segment`] found below it.
        names (`Mapping[int, str]`): `id` of each trainable parameter of the model, with its name.

    Returns:
        `list[GraphPiece]`: The uppermost first; a single one where the branches do not meet. No two use the same
        parameter.
    """
    own = set(segment.nodes)
    readers: Counter[Node] = Counter()
    split_outputs: set[Node] = set()
    for node in segment.nodes:
        for child, number in node.next_functions:
            if child in own:
                readers[child] += 1
                if number:
                    split_outputs.add(child)
    pieces = [GraphPiece(output, [], {})]
    unread = dict(readers)
    ready, waiting, left = [output.node], set[Node](), False
    while ready:
        node = ready.pop()
        # All other branches have come to an end, or to this node: what is below is reached through it alone.
        if not ready and not waiting and not left and readers[node] > 1 and node not in split_outputs:
            pieces.append(GraphPiece(GradientEdge(node, 0), [], {}))
        pieces[-1].nodes.append(node)
        for child, _ in node.next_functions:
            if child in segment.boundaries:
                left = True
            elif child in own:
                unread[child] -= 1
                if unread[child]:
                    waiting.add(child)
                else:
                    waiting.discard(child)
                    ready.append(child)
            elif (name := names.get(id(getattr(child, "variable", None)))) is not None:
                pieces[-1].parameters[name] = segment.parameters[name]
    return _without_shared_parameters(pieces)


def _without_shared_parameters(pieces: list[GraphPiece]) -> list[GraphPiece]:
    """
    Joins pieces that use a parameter together, and those between them: differentiated by that parameter, the upper one
    would not end at the cut, so that what lies below it would be counted twice.
    """
    joined: list[GraphPiece] = []
    for piece in pieces:
        shared = [i for i, above in enumerate(joined) if above.parameters.keys() & piece.parameters.keys()]
        first = shared[0] if shared else len(joined)
        together = [*joined[first:], piece]
        nodes = [node for part in together for node in part.nodes]
        parameters = {name: parameter for part in together for name, parameter in part.parameters.items()}
        joined[first:] = [GraphPiece(together[0].output, nodes, parameters)]
    return joined
