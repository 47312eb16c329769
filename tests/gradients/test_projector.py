"""Scalars and in-place projection of single tensors, and the report made from scalars."""

import pytest
import torch

from hf_aegis.gradients import GradientProjector, OneSidedGramSchmidt, ProjectionReport, projector


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_bending_without_reading_alpha_gives_the_same(dtype):
    """What runs on accelerators, where the host must not wait for α."""
    gradient, reference = torch.randn(2, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    alpha = torch.tensor(-0.3712345, dtype=torch.promote_types(dtype, torch.float32))
    read, unread = gradient.clone(), gradient.clone()
    projector.bend(read, reference, alpha)
    projector._bend_on_device(unread, reference, alpha)
    torch.testing.assert_close(unread, read)
    assert not torch.equal(unread, gradient)
    poisoned = torch.full_like(reference, float("nan"))
    for bend in (projector.bend, projector._bend_on_device):
        untouched = gradient.clone()
        bend(untouched, poisoned, torch.zeros_like(alpha))
        assert torch.equal(untouched, gradient)


def test_a_group_is_projected_at_its_last_tensor():
    groups = GradientProjector(lambda name: "group", "layer", OneSidedGramSchmidt())
    parameters = {name: torch.nn.Parameter(torch.zeros(1)) for name in "ab"}
    groups.expect(parameters)
    for name, reference in (("a", 1.0), ("b", 1.0)):
        groups.add_reference(name, torch.tensor([reference]))
    for name, gradient in (("a", -3.0), ("b", 1.0)):
        assert parameters["a"].grad is None or parameters["a"].grad.item() == -3.0
        groups.on_gradient(name, torch.tensor([gradient]))
        parameters[name].grad = torch.tensor([gradient])
        groups.on_accumulated(name, parameters[name])
    # d = -2, ‖r‖² = 2, α = -1.
    assert [parameter.grad.item() for parameter in parameters.values()] == pytest.approx([-2.0, 2.0])
    names, scalars = groups.finish()
    assert names == ["group"]
    assert scalars.tolist() == [pytest.approx([-2.0, 10.0, 2.0, -1.0])]


def report(**changes):
    scalars = {
        "dot": [-1.0, 2.0],
        "task_squared_norm": [4.0, 1.0],
        "reference_squared_norm": [1.0, 4.0],
        "alpha": [-1.0, 0.0],
        "mean_term": [0.5],
        "std_term": [0.25],
        **changes,
    }
    return ProjectionReport(groups=["a", "b"], **{k: torch.tensor(v) for k, v in scalars.items()}, penalty_scale=2.0)


def test_hand_computed_summary():
    assert report().summary() == pytest.approx(
        {
            "throttle_rate": 0.5,
            "energy_shed": 1 / 5,
            "cosine": (-0.5 + 1.0) / 2,
            "alpha": -0.5,
            "penalty": 1.5,
            "penalty_mean_term": 1.0,
            "penalty_std_term": 0.5,
            "vlm_grad_norm": 5**0.5,
            "vlm_grad_norm_projected": 2.0,
        }
    )


def test_the_cosine_stays_in_range_at_the_ends_of_float32():
    for scale in (1e-15, 1e15):
        extreme = report(
            dot=[-(scale**2), scale**2],
            task_squared_norm=[4 * scale**2, scale**2],
            reference_squared_norm=[scale**2, 4 * scale**2],
        )
        assert extreme.cosine.tolist() == pytest.approx([-0.5, 0.5])


def test_zero_norms_have_a_cosine_of_zero():
    flat = report(dot=[0.0, 0.0], task_squared_norm=[0.0, 1.0], reference_squared_norm=[1.0, 0.0], alpha=[0.0, 0.0])
    assert flat.cosine.tolist() == flat.energy_shed.tolist() == [0.0, 0.0]
    nothing = report(dot=[0.0] * 2, task_squared_norm=[0.0] * 2, reference_squared_norm=[0.0] * 2, alpha=[0.0] * 2)
    assert nothing.summary()["energy_shed"] == 0.0


def test_bending_can_go_an_accelerators_way_on_the_cpu(monkeypatch):
    gradient, reference, alpha = torch.tensor([2.0, 4.0]), torch.tensor([1.0, -3.0]), torch.tensor(0.5)
    taken = []
    monkeypatch.setattr(projector, "_bend_on_device", lambda *tensors: taken.append(tensors))
    with projector.bending_on_device():
        projector.bend(gradient, reference, alpha)
    assert len(taken) == 1
    projector.bend(gradient, reference, alpha)
    assert len(taken) == 1
    assert gradient.tolist() == [1.5, 5.5]
