"""Where the projection acts: on the gradient in Adam's metric, and on what the optimiser makes of it."""

import copy

import pytest
import torch

from hf_aegis.gradients import AdamMetric, GradientShield, UpdateProjection


# Seeds and strengths of the push for which some groups conflict and others do not.
SEED, PUSH = 0, 0.5


@pytest.fixture
def case(make_case):
    return make_case("gemma2", seed=SEED, push=PUSH)


def step(case, optimizer, shield, backward_passes=1):
    """One optimiser step; returns the weights before it, and after it as changes."""
    before = {name: p.detach().clone() for name, p in case.parameters().items()}
    optimizer.zero_grad()
    for _ in range(backward_passes):
        with shield:
            case.loss().backward()
    optimizer.step()
    return {name: p.detach() - before[name] for name, p in case.parameters().items()}


def by_group(case, tensors):
    """Flat vectors of the protected groups, zeros where there is no tensor."""
    groups = {}
    for name, parameter in case.parameters().items():
        value = tensors.get(name)
        groups.setdefault(case.group_of(name), []).append(
            (torch.zeros_like(parameter) if value is None else value).flatten()
        )
    return {group: torch.cat(parts) for group, parts in groups.items() if group is not None}


@pytest.mark.parametrize("granularity", ["layer", "global", "tensor"])
def test_without_momentum_the_update_is_projected_as_the_gradient_is(case, assert_same, granularity):
    other = copy.deepcopy(case)
    shields = [GradientShield(c.model, c.anchor, granularity=granularity) for c in (case, other)]
    optimizers = [torch.optim.SGD(c.parameters().values(), lr=0.1) for c in (case, other)]
    UpdateProjection(shields[1], optimizers[1])
    for _ in range(3):
        expected = step(case, optimizers[0], shields[0])
        found = step(other, optimizers[1], shields[1])
        assert_same(found, expected, 1e-9)
        assert shields[1].report.dot.tolist() == pytest.approx(shields[0].report.dot.tolist(), rel=1e-8)
        assert not shields[1].report.alpha.any()
        assert granularity == "global" or shields[0].report.alpha.any()


@pytest.mark.parametrize("backward_passes", [1, 2])
def test_no_step_of_adamw_works_against_the_reference(case, backward_passes):
    other = copy.deepcopy(case)
    optimizers = [torch.optim.AdamW(c.parameters().values(), lr=1e-2, weight_decay=0.1) for c in (case, other)]
    shields = [GradientShield(c.model, c.anchor) for c in (case, other)]
    UpdateProjection(shields[1], optimizers[1])
    bent = 0
    for _ in range(4):
        other.model.load_state_dict(case.model.state_dict())
        optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
        _, reference, _ = case.differentiate()
        # The same gradients reach both optimisers: those of a plain step.
        case_step = plain_step(case, optimizers[0], backward_passes)
        found = by_group(case, step(other, optimizers[1], shields[1], backward_passes))
        for group, r in by_group(case, reference).items():
            plain = by_group(case, case_step)[group]
            conflict = float(plain @ r) > 0
            bent += conflict
            expected = plain - (plain @ r) / (r @ r) * r if conflict else plain
            torch.testing.assert_close(found[group], expected, rtol=1e-6, atol=1e-9)
    # Neither always nor never.
    assert 0 < bent < 4 * len(shields[1].report.groups)


def plain_step(case, optimizer, backward_passes):
    before = {name: p.detach().clone() for name, p in case.parameters().items()}
    optimizer.zero_grad()
    for _ in range(backward_passes):
        case.loss().backward()
    optimizer.step()
    return {name: p.detach() - before[name] for name, p in case.parameters().items()}


def test_a_dropped_step_leaves_nothing_behind(case):
    shield = GradientShield(case.model, case.anchor)
    optimizer = torch.optim.SGD(case.parameters().values(), lr=0.1)
    updates = UpdateProjection(shield, optimizer)
    with shield:
        case.loss().backward()
    optimizer.zero_grad()
    optimizer.step()
    assert not updates._references
    fresh = copy.deepcopy(case)
    found = step(case, optimizer, shield)
    other = GradientShield(fresh.model, fresh.anchor)
    optimizer = torch.optim.SGD(fresh.parameters().values(), lr=0.1)
    UpdateProjection(other, optimizer)
    expected = step(fresh, optimizer, other)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_in_the_metric_of_adam_the_rescaled_gradient_is_projected(case):
    optimizer = torch.optim.AdamW(case.parameters().values(), lr=1e-2, betas=(0.9, 0.99), eps=1e-6)
    shield = GradientShield(case.model, case.anchor)
    shield.metric = AdamMetric(case.model, optimizer)
    # Before the first step all elements count alike.
    task, reference, _ = case.differentiate()
    expected, _ = case.project(task, reference)
    with shield:
        case.loss().backward()
    for name, gradient in case.gradients().items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-7, atol=1e-10)
    optimizer.step()
    # A loaded state replaces the optimiser's groups.
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    task, reference, _ = case.differentiate()
    rescale = {}
    for name, parameter in case.parameters().items():
        squares = optimizer.state[parameter]["exp_avg_sq"] / (1 - 0.99)
        rescale[name] = 1 / (squares.sqrt() + 1e-6)
    case.model.zero_grad()
    with shield:
        case.loss().backward()
    found, p = by_group(case, case.gradients()), by_group(case, rescale)
    g, r = by_group(case, task), by_group(case, reference)
    bent = 0
    for index, group in enumerate(shield.report.groups):
        dot = (p[group] * g[group]) @ r[group]
        square = (p[group] * r[group]) @ r[group]
        assert float(shield.report.dot[index]) == pytest.approx(float(dot), rel=1e-5)
        assert float(shield.report.reference_squared_norm[index]) == pytest.approx(float(square), rel=1e-5)
        expected = g[group] - dot / square * r[group] if dot < 0 else g[group]
        # Norms are in float32 inside transformers.
        torch.testing.assert_close(found[group], expected, rtol=1e-5, atol=1e-8)
        if dot < 0:
            bent += 1
            assert abs(float((p[group] * found[group]) @ r[group])) <= 1e-5 * float(-dot)
    assert 0 < bent < len(shield.report.groups)


def test_an_optimiser_of_another_kind_has_no_such_metric(case):
    optimizer = torch.optim.SGD(case.parameters().values(), lr=0.1, momentum=0.9)
    shield = GradientShield(case.model, case.anchor)
    shield.metric = AdamMetric(case.model, optimizer)
    step(case, optimizer, shield)
    with pytest.raises(ValueError, match=r"of \S+weight, but SGD keeps \['momentum_buffer'\]"):
        step(case, optimizer, shield)
