"""Where a layer's graph is cut, on graphs small enough to see through."""

import pytest
import torch
from torch.autograd.graph import get_gradient_edge

from hf_aegis.gradients.graph import split_at_bottlenecks, walk_segment


def cut(build):
    """The parameters of each piece of `build(x, one, two, three)`'s graph, and the pieces; `x` is the layer below."""
    parameters = {name: torch.nn.Parameter(torch.randn(4, 4)) for name in ("one", "two", "three")}
    below = torch.randn(2, 4, requires_grad=True) * 2
    output = get_gradient_edge(build(below, *parameters.values()))
    names = {id(parameter): name for name, parameter in parameters.items()}
    segment = walk_segment(output, {below.grad_fn}, names)
    pieces = split_at_bottlenecks(output, segment, names)
    assert pieces[0].output == output
    # Each node in one piece.
    nodes = [node for piece in pieces for node in piece.nodes]
    assert len(nodes) == len(set(nodes))
    assert set(nodes) == set(segment.nodes)
    return [sorted(piece.parameters) for piece in pieces]


def residual_stream(x, one, two, three):
    middle = x + torch.tanh(x @ one)
    return middle + torch.tanh(middle @ two) * (middle @ three)


def side_by_side(x, one, two, three):
    return x + torch.tanh(x @ one) + (x @ two) @ three


def past_the_middle(x, one, two, three):
    middle = x + torch.tanh(x @ one)
    return middle + middle @ two @ three + x


def parameter_in_both(x, one, two, three):
    middle = x + torch.tanh(x @ one)
    return middle + middle @ one @ two @ three


def several_outputs(x, one, two, three):
    left, right = (x @ one).split(2, dim=1)
    return torch.tanh(left @ two[:2]) + right @ three[:2]


def a_stream_without_what_is_below(x, one, two, three):
    middle = torch.tanh(one @ two)
    return middle + middle @ three


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (residual_stream, [["three", "two"], ["one"]]),
        (side_by_side, [["one", "three", "two"]]),
        (past_the_middle, [["one", "three", "two"]]),
        # Differentiated by "one", the upper piece would go through the cut to the lower one's, and count it twice.
        (parameter_in_both, [["one", "three", "two"]]),
        (several_outputs, [["one", "three", "two"]]),
        (a_stream_without_what_is_below, [["three"], ["one", "two"]]),
    ],
)
def test_pieces_begin_where_all_branches_meet(build, expected):
    assert cut(build) == expected


def around_a_cut(x, one, two, three):
    middle = x + torch.tanh(x @ one)
    upper = middle + torch.tanh(middle @ two)
    return upper + torch.tanh(upper @ one @ three)


@pytest.mark.parametrize("build", [residual_stream, parameter_in_both, around_a_cut, several_outputs, side_by_side])
def test_piece_by_piece_gradients_are_those_of_the_whole(build):
    parameters = {name: torch.nn.Parameter(torch.randn(4, 4, dtype=torch.float64)) for name in ("one", "two", "three")}
    below = torch.randn(2, 4, dtype=torch.float64, requires_grad=True) * 2
    output = build(below, *parameters.values())
    cotangent = torch.randn_like(output)
    expected = torch.autograd.grad(output, [below, *parameters.values()], cotangent, retain_graph=True)
    names = {id(parameter): name for name, parameter in parameters.items()}
    edge = get_gradient_edge(output)
    pieces = split_at_bottlenecks(edge, walk_segment(edge, {below.grad_fn}, names), names)
    found = {}
    for piece, lower in zip(pieces, [*(p.output for p in pieces[1:]), get_gradient_edge(below)], strict=True):
        cotangent, *gradients = torch.autograd.grad(
            [piece.output], [lower, *piece.parameters.values()], [cotangent], retain_graph=True
        )
        for name, gradient in zip(piece.parameters, gradients, strict=True):
            found[name] = found.get(name, 0) + gradient
    torch.testing.assert_close(cotangent, expected[0])
    for name, gradient in zip(parameters, expected[1:], strict=True):
        torch.testing.assert_close(found[name], gradient)


@pytest.mark.parametrize("kind", ["gemma2", "llama", "qwen2"])
def test_decoder_layers_fall_into_feed_forward_block_and_attention(kind, make_case):
    from hf_aegis.gradients import GradientShield

    case = make_case(kind)
    shield = GradientShield(case.model, case.anchor)
    with shield:
        case.loss()
        layers = shield._recorder.passes[-1].layers
        for index, record in layers.items():
            pieces = [{name.split(".")[3] for name in p.parameters if "layers." in name} for p in record.products]
            assert "mlp" in pieces[0]
            assert "self_attn" in pieces[1]
            assert "self_attn" not in pieces[0]
            assert "mlp" not in pieces[1]
            # And below the lowest layer the embeddings.
            assert len(pieces) == (3 if index == 0 else 2)
