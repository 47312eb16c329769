"""π0: the action expert reads every decoder layer's keys and values from the cache, and no hidden output at all."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hf_aegis.gradients import GradientShield, LostGradientError


FORMS = pytest.mark.parametrize("form", ["streaming", "two_pass"])


@FORMS
@pytest.mark.parametrize("granularity", ["layer", "global", "tensor"])
@pytest.mark.parametrize("seed", [0, 1])
def test_both_forms_equal_the_oracle(seed, granularity, form, make_case, assert_same):
    case = make_case("pi0", seed=seed)
    task, reference, _ = case.differentiate()
    expected, scalars = case.project(task, reference, granularity)
    assert any(s.dot < 0 for s in scalars.values()) or (seed, granularity) == (0, "global")
    if seed == 0 and granularity == "layer":
        assert any(s.dot > 0 for s in scalars.values())
    # The last layer's output feeds nothing, so what follows its keys and values has a reference but no task gradient.
    last = "model.vlm.language_model.layers.2."
    assert task[last + "mlp.up_proj.weight"] is None
    assert reference[last + "mlp.up_proj.weight"] is not None
    assert task[last + "self_attn.k_proj.weight"].norm() > 0
    case.model.zero_grad()
    shield = GradientShield(case.model, case.anchor, dual_backward=form, granularity=granularity)
    with shield:
        case.loss().backward()
    assert_same(case.gradients(), expected, 1e-8)
    assert sorted(shield.report.groups) == sorted(scalars)


@FORMS
def test_the_expert_keeps_its_task_gradient(form, make_case):
    case = make_case("pi0", torch.float32)
    case.loss().backward()
    plain = case.gradients()
    case.model.zero_grad()
    with GradientShield(case.model, case.anchor, dual_backward=form):
        case.loss().backward()
    expert = [name for name in plain if case.group_of(name) is None]
    assert len(expert) > 20
    for name, gradient in case.gradients().items():
        assert (gradient is None) == (plain[name] is None)
        if name in expert and gradient is not None:
            assert torch.equal(gradient, plain[name]), name


@FORMS
def test_a_gradient_that_checkpointing_cuts_off_is_an_error(form, make_case):
    """Checkpointed layers of transformers do not write the cache, and the expert would train blind."""
    case = make_case("pi0")
    for layer in case.model.model.vlm.language_model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    case.batch.pop("attention_mask")
    case.loss().backward()
    gradients = case.gradients()
    protected = [name for name in gradients if case.group_of(name) is not None]
    assert all(gradients[name] is None for name in protected)
    shield = GradientShield(case.model, case.anchor, dual_backward=form)
    before = [len(layer._forward_hooks) for layer in shield.layers]
    with pytest.raises(LostGradientError, match="gradient reached no decoder layer"), shield:
        case.loss().backward()
    assert [len(layer._forward_hooks) for layer in shield.layers] == before


def test_transformers_refuses_to_checkpoint_the_whole_model(make_case):
    """If this no longer fails, checkpointing of π0 has to be looked at again."""
    case = make_case("pi0", checkpointing=True)
    with pytest.raises(AttributeError, match="get_seq_length"), GradientShield(case.model, case.anchor):
        case.loss()


@FORMS
def test_checkpointing_the_vision_tower_alone_is_fine(form, make_case, assert_same):
    case = make_case("pi0")
    expected, _ = case.project(*case.differentiate()[:2])
    case.model.zero_grad()
    case.model.model.vlm.vision_tower.activation_checkpointing_enable()
    with GradientShield(case.model, case.anchor, dual_backward=form):
        case.loss().backward()
    assert_same(case.gradients(), expected, 1e-8)


def test_no_loss_no_complaint(make_case):
    case = make_case("pi0")
    with GradientShield(case.model, case.anchor) as shield:
        case.loss()
    assert shield.report is None
    case.model.model.vlm.requires_grad_(False)
    with shield:
        case.loss().backward()
    assert shield.report.groups == []
    assert shield.report.summary() == {}
