"""What happens around one backward pass: accumulation, scaling, missing and non-finite gradients."""

import math

import pytest
import torch

from hf_aegis.gradients import GradientShield


FORMS = pytest.mark.parametrize("form", ["streaming", "two_pass"])


@FORMS
@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulation_sums_separately_projected_gradients(form, checkpointing, make_case, make_batch, assert_same):
    case = make_case("gemma2", checkpointing=checkpointing)
    batches = [case.batch, make_batch("gemma2", torch.float64, seed=11, size=2)]
    parts = []
    for batch in batches:
        case.batch = batch
        parts.append(case.project(*case.differentiate()[:2])[0])
    expected = {name: parts[0][name] + parts[1][name] for name in parts[0]}
    shield = GradientShield(case.model, case.anchor, dual_backward=form)
    for one_block in (True, False):
        case.model.zero_grad()
        if one_block:
            with shield:
                for batch in batches:
                    case.loss(batch).backward()
        else:
            for batch in batches:
                with shield:
                    case.loss(batch).backward()
        assert_same(case.gradients(), expected, 1e-8)


@FORMS
@pytest.mark.parametrize("factor", [1e-3, 64.0])
def test_a_scaled_loss_gives_scaled_gradients(form, factor, make_case, assert_same):
    case = make_case("llama")
    shield = GradientShield(case.model, case.anchor, dual_backward=form)
    with shield:
        case.loss().backward()
    plain, summary = case.gradients(), shield.report.summary()
    case.model.zero_grad()
    with shield:
        (factor * case.loss()).backward()
    # A factor that is no power of two changes how transformers' float32 norms round.
    assert_same(case.gradients(), {name: factor * value for name, value in plain.items()}, 1e-6)
    scaled = shield.report.summary()
    assert scaled["alpha"] == pytest.approx(factor * summary["alpha"], rel=1e-5)
    for key in ("throttle_rate", "energy_shed", "cosine", "penalty"):
        assert scaled[key] == pytest.approx(summary[key], rel=1e-5)


@FORMS
def test_unused_parameters_stay_without_gradient(form, make_case, assert_same):
    case = make_case("llama")
    case.model.unused = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    case.model.model.layers[1].unused = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def hidden_loss():
        """Reads the second layer's output only, so that the third layer has a reference but no task gradient."""
        states = case.model.model(
            input_ids=case.batch["input_ids"], attention_mask=case.batch["attention_mask"], output_hidden_states=True
        ).hidden_states[2]
        return (states * case.anchor.mean[1].double()).mean()

    # The inner model is called directly, so the shield is made for it.
    shield = GradientShield(case.model.model, case.anchor, dual_backward=form)
    expected, scalars = case.project(*case.differentiate(hidden_loss)[:2])
    assert any(s.dot < 0 for s in scalars.values())
    case.model.zero_grad()
    with shield:
        hidden_loss().backward()
    assert_same(case.gradients(), expected, 1e-8)
    assert case.model.unused.grad is None
    assert case.model.model.layers[1].unused.grad is None
    assert all(p.grad is None for p in case.model.model.layers[2].parameters())
    assert shield.report.groups == ["layers.0", "layers.1", "embeddings"]


def poison(case, name, value):
    """Makes the task gradient of one parameter non-finite; the loss and other gradients stay as they are."""
    parameter = dict(case.model.named_parameters())[name]

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(context, tensor):
            return tensor.sum() * 0

        @staticmethod
        def backward(context, gradient):
            return torch.full_like(parameter, value)

    return case.loss() + Poison.apply(parameter)


@FORMS
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("drop", [True, False])
def test_non_finite_task_gradient(form, value, drop, make_case, caplog):
    case = make_case("gemma2")
    shield = GradientShield(case.model, case.anchor, dual_backward=form, drop_non_finite=drop)
    expected, _ = case.project(*case.differentiate()[:2])
    name = "model.layers.1.mlp.up_proj.weight"
    with shield:
        poison(case, name, value).backward()
    found = case.gradients()
    assert shield.report.is_finite().tolist() == [group != "layers.1" for group in shield.report.groups]
    for other, gradient in found.items():
        if case.group_of(other) == "layers.1":
            if drop:
                assert gradient is None
            elif other == name:
                assert not torch.isfinite(gradient).all()
        else:
            torch.testing.assert_close(gradient, expected[other], rtol=1e-7, atol=1e-12)
    assert shield.report.dropped == (["layers.1"] if drop else [])
    assert ("layers.1" in caplog.text) == drop
    if drop:
        optimizer = torch.optim.AdamW(case.model.parameters())
        torch.nn.utils.clip_grad_norm_(case.model.parameters(), 1.0)
        optimizer.step()
        assert all(torch.isfinite(p).all() for p in case.model.parameters())


@FORMS
def test_a_loss_of_nan_reaches_no_parameter(form, make_case):
    case = make_case("pi0")
    shield = GradientShield(case.model, case.anchor, dual_backward=form)
    before = {name: p.detach().clone() for name, p in case.model.named_parameters()}
    with shield:
        (case.loss() * math.nan).backward()
    assert all(gradient is None for gradient in case.gradients().values())
    assert shield.report.dropped[-1] == "unprotected"
    torch.nn.utils.clip_grad_norm_(case.model.parameters(), 1.0)
    torch.optim.AdamW(case.model.parameters()).step()
    assert all(torch.equal(p, before[name]) for name, p in case.model.named_parameters())


@FORMS
def test_a_reference_that_is_not_finite_leaves_its_group_alone(form, make_case, assert_same):
    case = make_case("gemma2")
    case.loss().backward()
    plain = case.gradients()
    expected, _ = case.project(*case.differentiate()[:2])
    case.anchor.mean[1, 0] = math.nan  # poisons layers 0 and 1 and what lies below, not layer 2
    shield = GradientShield(case.model, case.anchor, dual_backward=form)
    case.model.zero_grad()
    with shield:
        case.loss().backward()
    found = case.gradients()
    for name, gradient in found.items():
        if case.group_of(name) == "layers.2":
            torch.testing.assert_close(gradient, expected[name], rtol=1e-7, atol=1e-12)
        else:
            assert torch.equal(gradient, plain[name])
    assert any(not torch.equal(found[n], plain[n]) for n in found)
    report = shield.report
    assert torch.isfinite(report.alpha).all()
    assert torch.isfinite(report.energy_shed).all()
    shed = dict(zip(report.groups, report.energy_shed.tolist(), strict=True))
    assert shed["layers.2"] > 0 and shed["layers.0"] == shed["layers.1"] == shed["embeddings"] == 0
    assert math.isfinite(report.summary()["energy_shed"])


def test_training_for_some_steps_re_uses_the_shield(make_case, make_batch):
    case = make_case("gemma2", torch.float32, checkpointing=True)
    shield = GradientShield(case.model, case.anchor)
    optimizer = torch.optim.AdamW(case.model.parameters(), lr=1e-2)
    losses, penalties = [], []
    for _ in range(12):
        with shield:
            loss = case.loss()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        penalties.append(shield.report.summary()["penalty"])
    assert losses[-1] < losses[0]
    assert len(set(penalties)) == len(penalties)


@FORMS
def test_two_forward_passes_and_one_summed_loss(form, make_case, make_batch, assert_same):
    case = make_case("gemma2")
    batches = [case.batch, make_batch("gemma2", torch.float64, seed=11)]
    tasks, references = [], []
    for batch in batches:
        case.batch = batch
        task, reference, _ = case.differentiate()
        tasks.append(task)
        references.append(reference)
    total = [
        {name: None if first[name] is None else first[name] + second[name] for name in first}
        for first, second in (tasks, references)
    ]
    expected, scalars = case.project(*total)
    assert any(s.dot < 0 for s in scalars.values())
    shield = GradientShield(case.model, case.anchor, dual_backward=form)
    case.model.zero_grad()
    with shield:
        (case.loss(batches[0]) + case.loss(batches[1])).backward()
    assert_same(case.gradients(), expected, 1e-8)
    assert shield.report.mean_term.shape == (6,)


@FORMS
def test_two_forward_passes_and_separate_backward_passes(form, make_case, make_batch, assert_same):
    case = make_case("gemma2", checkpointing=True)
    batches = [case.batch, make_batch("gemma2", torch.float64, seed=11)]
    parts = []
    for batch in batches:
        case.batch = batch
        parts.append(case.project(*case.differentiate()[:2])[0])
    expected = {name: parts[0][name] + parts[1][name] for name in parts[0]}
    shield = GradientShield(case.model, case.anchor, dual_backward=form)
    case.model.zero_grad()
    with shield:
        first, second = case.loss(batches[0]), case.loss(batches[1])
        first.backward()
        early = shield.report
        second.backward()
    assert_same(case.gradients(), expected, 1e-8)
    assert early is not shield.report
    assert early.mean_term.shape == shield.report.mean_term.shape == (3,)


@FORMS
def test_evaluation_inside_the_context_is_ignored(form, make_case, make_batch, assert_same):
    case = make_case("gemma2")
    expected, _ = case.project(*case.differentiate()[:2])
    other = make_batch("gemma2", torch.float64, seed=11)
    case.model.zero_grad()
    with GradientShield(case.model, case.anchor, dual_backward=form):
        with torch.no_grad():
            case.loss(other)
        loss = case.loss()
        with torch.inference_mode():
            case.loss(other)
        case.loss(other)  # with a graph, and dropped
        loss.backward()
    assert_same(case.gradients(), expected, 1e-8)
