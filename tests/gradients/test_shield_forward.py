"""The shield leaves the forward pass alone, and autocast, dropout and half precision work under it."""

import pytest
import torch

from hf_aegis.gradients import GradientShield


def run(case, seed=5, autocast=False, shield=None, backward=False):
    case.model.zero_grad()
    torch.manual_seed(seed)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = case.model(**case.batch, output_hidden_states=True)
            away = case.anchor.mean[-1].to(output.hidden_states[-1].dtype)
            loss = output.loss + case.push * (output.hidden_states[-1] * away).mean()
        if backward:
            loss.backward()
        return loss.detach(), output.logits.detach()

    if shield is None:
        return step()
    with shield:
        return step()


@pytest.mark.parametrize("form", ["streaming", "two_pass"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["gemma2", "llama", "paligemma2"])
def test_forward_is_the_same_bit_for_bit(kind, checkpointing, form, make_case):
    options = {} if kind == "paligemma2" else {"attention_dropout": 0.3}
    case = make_case(kind, torch.float32, checkpointing=checkpointing, **options)
    shield = GradientShield(case.model, case.anchor, dual_backward=form)
    for autocast in (False, True):
        plain = run(case, autocast=autocast)
        shielded = run(case, autocast=autocast, shield=shield, backward=True)
        for mine, theirs in zip(shielded, plain, strict=True):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs)
    if options:
        assert not torch.equal(run(case, seed=6)[0], run(case, seed=5)[0])


@pytest.mark.parametrize("kind", ["gemma2", "llama"])
def test_the_random_state_after_a_step_is_the_plain_one(kind, make_case):
    case = make_case(kind, torch.float32, checkpointing=True, attention_dropout=0.3)
    states = []
    for shield in (None, GradientShield(case.model, case.anchor)):
        run(case, shield=shield, backward=True)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("form", ["streaming", "two_pass"])
def test_recomputation_repeats_dropout(form, make_case, assert_same):
    case = make_case("gemma2", attention_dropout=0.3)
    shield = GradientShield(case.model, case.anchor, dual_backward=form)
    run(case, shield=shield, backward=True)
    expected = case.gradients()
    run(case, seed=6, shield=shield, backward=True)
    with pytest.raises(AssertionError, match="relative difference"):
        assert_same(case.gradients(), expected, 1e-3)
    case.model.activation_checkpointing_enable()
    run(case, shield=shield, backward=True)
    assert_same(case.gradients(), expected, 1e-12)


def test_dropout_against_the_oracle(make_case, assert_same):
    case = make_case("gemma2", checkpointing=True, attention_dropout=0.3)

    def loss():
        torch.manual_seed(5)
        return case.loss()

    expected, scalars = case.project(*case.differentiate(loss)[:2])
    assert any(s.dot < 0 for s in scalars.values())
    case.model.zero_grad()
    with GradientShield(case.model, case.anchor):
        loss().backward()
    assert_same(case.gradients(), expected, 1e-8)


@pytest.mark.parametrize("kind", ["gemma2", "qwen2"])
def test_autocast(kind, make_case, assert_same):
    case = make_case(kind, torch.float32)
    gradients = {}
    for checkpointing in (False, True):
        for form in ("streaming", "two_pass"):
            if checkpointing:
                case.model.activation_checkpointing_enable()
            shield = GradientShield(case.model, case.anchor, dual_backward=form)
            run(case, autocast=True, shield=shield, backward=True)
            gradients[form, checkpointing] = case.gradients()
            assert shield.report.summary()["throttle_rate"] > 0
    for form in ("streaming", "two_pass"):
        # The recomputation runs in bfloat16 as well: in float32 it would differ by rounding, if it ran at all.
        assert_same(gradients[form, True], gradients[form, False], 1e-6)
    assert_same(gradients["streaming", False], gradients["two_pass", False], 2e-2)
    run(case, autocast=False, shield=GradientShield(case.model, case.anchor), backward=True)
    assert_same(gradients["streaming", False], case.gradients(), 0.2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bfloat16_parameters(checkpointing, make_case, assert_same):
    case = make_case("gemma2", torch.bfloat16, checkpointing=checkpointing)
    gradients = {}
    for form in ("streaming", "two_pass"):
        case.model.zero_grad()
        shield = GradientShield(case.model, case.anchor, dual_backward=form)
        with shield:
            case.loss().backward()
        gradients[form] = case.gradients()
        summary = shield.report.summary()
        assert summary["throttle_rate"] > 0
        assert summary["energy_shed"] > 1e-3
        assert shield.report.dot.dtype == torch.float32
    assert all(gradient.dtype == torch.bfloat16 for gradient in gradients["streaming"].values())
    assert_same(gradients["streaming"], gradients["two_pass"], 3e-2)
    exact = make_case("gemma2", torch.float64)
    expected, _ = exact.project(*exact.differentiate()[:2])
    assert_same(gradients["streaming"], expected, 0.1)
