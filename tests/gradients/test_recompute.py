"""Checkpointing whose one recomputation serves two products."""

import weakref
from functools import partial

import pytest
import torch
from torch import nn

from hf_aegis.gradients import GradientShield, RecomputeMismatchError, SharedRecompute


class Switch:
    """What the shield tells the recomputation: whether a saved tensor will be read again."""

    def __init__(self):
        self.again = False

    def __call__(self):
        return self.again


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)
        self.calls = 0
        self.finished = 0

    def forward(self, x, scale=1.0):
        self.calls += 1
        out = self.second(torch.dropout(torch.tanh(self.first(x)), 0.5, self.training)) * scale
        out = out + 1  # saves nothing
        self.finished += 1
        return out


def test_one_recomputation_for_two_products():
    block, switch = Block(), Switch()
    x = torch.randn(3, 4, requires_grad=True)
    cotangents = torch.randn(2, 3, 4)
    parameters = list(block.parameters())
    torch.manual_seed(1)
    out = block(x)
    expected = [torch.autograd.grad(out, [x, *parameters], c, retain_graph=True) for c in cotangents]
    torch.manual_seed(1)
    block.calls = block.finished = 0
    out = SharedRecompute(switch)(partial(block, scale=1.0), x)
    assert block.calls == 1
    state = torch.get_rng_state()
    torch.manual_seed(99)
    ahead = torch.get_rng_state()
    switch.again = True
    first = torch.autograd.grad(out, [x, *parameters], cotangents[0], retain_graph=True)
    switch.again = False
    second = torch.autograd.grad(out, [x, *parameters], cotangents[1])
    assert block.calls == 2
    assert torch.equal(torch.get_rng_state(), ahead)
    assert not torch.equal(state, ahead)
    for found, wanted in zip((first, second), expected, strict=True):
        for mine, theirs in zip(found, wanted, strict=True):
            assert torch.equal(mine, theirs)


def test_recomputation_stops_at_the_last_saved_tensor():
    block = Block().eval()

    def function(x):
        out = block(x)
        block.reached_end = True
        return out

    out = SharedRecompute(Switch())(function, torch.randn(3, 4, requires_grad=True))
    assert block.reached_end
    block.reached_end = False
    block.finished = 0
    out.sum().backward()
    assert block.calls == 2
    assert block.finished == 0
    assert not block.reached_end


def test_what_is_kept_and_for_how_long():
    block, switch = Block().eval(), Switch()
    activations = []
    block.first.register_forward_hook(lambda module, args, out: activations.append(weakref.ref(out.sigmoid())))
    block.second.register_forward_pre_hook(lambda module, args: activations.append(weakref.ref(args[0])))

    def alive():
        return [reference() is not None for reference in activations[1::2]]

    plain = block(torch.randn(3, 4, requires_grad=True))
    assert alive() == [True]
    del plain
    activations.clear()
    out = SharedRecompute(switch)(block, torch.randn(3, 4, requires_grad=True))
    assert alive() == [False]
    switch.again = True
    torch.autograd.grad(out.sum(), list(block.parameters()), retain_graph=True)
    switch.again = False
    out.sum().backward()
    assert alive() == [False, False]


def test_a_second_backward_pass_is_refused():
    block = Block().eval()
    out = SharedRecompute(Switch())(block, torch.randn(3, 4, requires_grad=True))
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated again after its last backward pass"):
        out.sum().backward()


@pytest.mark.parametrize("change", ["shape", "dtype", "fewer", "more"])
def test_a_recomputation_that_differs_is_refused(change):
    state = {"changed": False}
    weight = torch.randn(4, 4, requires_grad=True)

    def function(x):
        if not state["changed"]:
            return torch.tanh(torch.tanh(x @ weight))
        if change == "shape":
            return torch.tanh(torch.tanh(x[:1] @ weight))
        if change == "dtype":
            return torch.tanh(torch.tanh(x.double() @ weight.double()))
        if change == "fewer":
            return x @ weight
        return torch.exp(torch.tanh(torch.sigmoid(x[:, :2] @ weight[:2])))

    out = SharedRecompute(Switch())(function, torch.randn(3, 4, requires_grad=True))
    state["changed"] = True
    with pytest.raises(RecomputeMismatchError, match=r"forward pass (had|saved)"):
        out.sum().backward()


def test_without_gradients_the_function_just_runs():
    block = Block().eval()
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert torch.equal(SharedRecompute(Switch())(block, x), block(x))


def test_autocast_is_restored():
    block = Block().eval()
    seen = []
    block.first.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = SharedRecompute(Switch())(block, torch.randn(3, 4, requires_grad=True))
    out.sum().backward()
    assert seen == [torch.bfloat16, torch.bfloat16]


@pytest.mark.parametrize(("form", "recomputations"), [("streaming", 1), ("two_pass", 2)])
@pytest.mark.parametrize("kind", ["gemma2", "llama", "paligemma2"])
def test_recomputations_of_each_layer_in_a_step(form, recomputations, kind, make_case):
    case = make_case(kind, torch.float32, checkpointing=True)
    shield = GradientShield(case.model, case.anchor, dual_backward=form)
    calls = dict.fromkeys(range(3), 0)

    def count(index, *_):
        calls[index] += 1

    for index, layer in enumerate(shield.layers):
        layer.input_layernorm.register_forward_pre_hook(partial(count, index))
    for step in (1, 2):
        with shield:
            case.loss().backward()
        assert list(calls.values()) == [step * (1 + recomputations)] * 3


def test_checkpointing_wants_the_non_reentrant_form_for_two_passes(make_case, assert_same):
    case = make_case("gemma2")
    expected, _ = case.project(*case.differentiate()[:2])
    case.model.zero_grad()
    case.model.activation_checkpointing_enable({"use_reentrant": True})
    case.model.enable_input_require_grads()
    before = [len(layer._forward_hooks) for layer in case.model.model.layers]
    with (
        pytest.raises(ValueError, match="layer 0 is checkpointed with use_reentrant=True"),
        GradientShield(case.model, case.anchor, dual_backward="two_pass"),
    ):
        pass
    assert [len(layer._forward_hooks) for layer in case.model.model.layers] == before
    # Streaming brings its own recomputation.
    with GradientShield(case.model, case.anchor):
        case.loss().backward()
    assert_same(case.gradients(), expected, 1e-8)
