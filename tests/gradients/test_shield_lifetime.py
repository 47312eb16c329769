"""What a shield leaves behind: no hooks, no memory; and what it says when it is used wrongly."""

import gc
import weakref

import pytest
import torch

from hf_aegis.gradients import GradientShield
from hf_aegis.gradients.projector import GradientProjector


FORMS = pytest.mark.parametrize("form", ["streaming", "two_pass"])


def hooks_of(model):
    """Every hook on modules and parameters, and every layer's checkpoint function."""
    found = []
    for name, module in model.named_modules():
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            found += [(name, kind)] * len(getattr(module, kind))
        found.append((name, id(getattr(module, "_gradient_checkpointing_func", None))))
    for name, parameter in model.named_parameters():
        found += [(name, "hook")] * len(parameter._backward_hooks or {})
        found += [(name, "accumulated")] * len(parameter._post_accumulate_grad_hooks or {})
    return found


@FORMS
@pytest.mark.parametrize("fails", [None, "forward", "backward", "inside"])
def test_no_hook_is_left_behind(form, fails, make_case, assert_same):
    case = make_case("gemma2", checkpointing=True)
    case.loss()  # transformers hooks its layers the first time that hidden states are asked for
    before = hooks_of(case.model)
    shield = GradientShield(case.model, case.anchor, dual_backward=form)

    def explode(*_):
        raise ZeroDivisionError

    def step():
        with shield:
            assert len(hooks_of(case.model)) > len(before)
            loss = case.loss()
            loss.backward()
            if fails == "inside":
                explode()

    if fails in ("forward", "backward"):
        layer = case.model.model.layers[1]
        handle = layer.register_forward_pre_hook(explode) if fails == "forward" else None
        if fails == "backward":
            handle = layer.mlp.up_proj.weight.register_hook(explode)
    if fails is None:
        step()
    else:
        with pytest.raises(ZeroDivisionError):
            step()
        if fails in ("forward", "backward"):
            handle.remove()
    assert hooks_of(case.model) == before
    # And the next step is as if nothing had happened.
    expected, _ = case.project(*case.differentiate()[:2])
    case.model.zero_grad()
    fails = None
    step()
    assert_same(case.gradients(), expected, 1e-8)
    assert hooks_of(case.model) == before


@FORMS
def test_going_on_in_the_block_after_a_failed_backward_pass(form, make_case, assert_same):
    case = make_case("gemma2")
    expected, _ = case.project(*case.differentiate()[:2])

    def explode(*_):
        raise ZeroDivisionError

    shield = GradientShield(case.model, case.anchor, dual_backward=form)
    case.model.zero_grad()
    with shield:
        loss = case.loss()
        handle = case.model.model.layers[1].mlp.up_proj.weight.register_hook(explode)
        with pytest.raises(ZeroDivisionError):
            loss.backward()
        handle.remove()
        assert shield.report is None
        case.model.zero_grad()
        case.loss().backward()
    assert_same(case.gradients(), expected, 1e-8)
    assert len(shield.report.groups) == 4


@FORMS
@pytest.mark.parametrize("checkpointing", [False, True])
def test_wrong_order_of_use(form, checkpointing, make_case):
    case = make_case("gemma2", checkpointing=checkpointing)
    shield = GradientShield(case.model, case.anchor, dual_backward=form)
    with shield:
        outside = case.loss()
    with pytest.raises(RuntimeError, match="inside one `with shield:` block"):
        outside.backward()
    with shield:
        loss = case.loss()
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="each backward pass once"):
            loss.backward()
    with shield:
        before = case.loss()
    with pytest.raises(RuntimeError, match="inside one `with shield:` block"), shield:
        before.backward()
    with shield, pytest.raises(RuntimeError, match="does not nest"):
        shield.__enter__()
    plain = case.loss()
    plain.backward()  # without a shield all is as ever


class Marker:
    """Lives as long as the graph that it is put into."""


class Mark(torch.autograd.Function):
    @staticmethod
    def forward(context, value, marker):
        context.marker = marker
        return value.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient, None


@FORMS
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("backward", [True, False])
def test_nothing_of_a_step_survives_its_block(form, checkpointing, backward, make_case):
    case = make_case("gemma2", checkpointing=checkpointing)
    shield = GradientShield(case.model, case.anchor, dual_backward=form)
    alive = []

    def note(module, args, output):
        alive.append(weakref.ref(output if torch.is_tensor(output) else output[0]))

    handles = [layer.register_forward_hook(note) for layer in shield.layers]
    gc.collect()
    gc.disable()
    try:
        with shield:
            marker = Marker()
            loss = Mark.apply(case.loss(), marker)
            alive.append(weakref.ref(marker))
            alive.append(weakref.ref(loss))
            del marker
            alive.extend(weakref.ref(record) for record in shield._recorder.passes[-1].layers.values())
            alive.append(weakref.ref(shield._recorder.passes[-1]))
            if backward:
                loss.backward()
                # The shield itself lets go right after the backward pass.
                assert not shield._recorder.passes
                assert not shield._recorder._outputs
            del loss
        assert [reference() for reference in alive] == [None] * len(alive)
    finally:
        gc.enable()
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_streaming_holds_one_layers_references(checkpointing, make_case, monkeypatch):
    case = make_case("llama", checkpointing=checkpointing)
    held = []
    add = GradientProjector.add_reference

    def spy(self, name, reference):
        add(self, name, reference)
        held.append({case.group_of(name) for name in self._references})

    monkeypatch.setattr(GradientProjector, "add_reference", spy)
    for form in ("streaming", "two_pass"):
        held.clear()
        with GradientShield(case.model, case.anchor, dual_backward=form):
            case.loss().backward()
        most = max(held, key=len)
        if form == "streaming":
            # Layer by layer; what is below the lowest one comes after it.
            assert held[0] == {"layers.2"}
            assert held[-1] == {"embeddings"}
            assert len(most) == 1
        else:
            assert len(most) == 4


def test_a_dropped_graph_does_not_keep_the_shield(make_case):
    case = make_case("llama")
    shield = GradientShield(case.model, case.anchor)
    with shield:
        loss = case.loss()
    reference = weakref.ref(shield)
    del shield
    gc.collect()
    assert reference() is None
    with pytest.raises(RuntimeError, match="no longer watches"):
        loss.backward()
