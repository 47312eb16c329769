import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_aegis.functional.flow_matching import (
    euler_integrate,
    flow_matching_loss,
    interpolate,
    sample_timesteps,
    target_velocity,
)


def _chunks(seed: int, shape: tuple[int, ...] = (3, 5, 2)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return noise, torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1


def test_path_by_hand():
    noise = torch.tensor([[[2.0, -4.0]], [[1.0, 1.0]]])
    actions = torch.tensor([[[6.0, 4.0]], [[0.0, 3.0]]])
    x = interpolate(noise, actions, torch.tensor([0.25, 0.5]))
    assert x.tolist() == [[[3.0, -2.0]], [[0.5, 2.0]]]
    assert target_velocity(noise, actions).tolist() == [[[4.0, 8.0]], [[-1.0, 2.0]]]


@given(seed=st.integers(0, 2**31), t=st.floats(0, 1))
@settings(deadline=None, max_examples=50)
def test_path_runs_from_noise_to_actions_at_constant_velocity(seed, t):
    noise, actions = _chunks(seed)
    at = lambda value: interpolate(noise, actions, torch.full((3,), value, dtype=torch.float64))  # noqa: E731
    assert torch.equal(at(0.0), noise)
    assert torch.equal(at(1.0), actions)
    # From any point of the path, the remaining time at that velocity ends at the actions.
    torch.testing.assert_close(at(t) + (1 - t) * target_velocity(noise, actions), actions)


@given(seed=st.integers(0, 2**31), t=st.floats(0, 1))
@settings(deadline=None, max_examples=50)
def test_same_path_as_pi0_with_time_reversed(seed, t):
    noise, actions = _chunks(seed)
    t_pi0 = 1 - t
    x_pi0 = t_pi0 * noise + (1 - t_pi0) * actions
    u_pi0 = noise - actions
    torch.testing.assert_close(interpolate(noise, actions, torch.full((3,), t, dtype=torch.float64)), x_pi0)
    assert torch.equal(target_velocity(noise, actions), -u_pi0)


def test_euler_equals_pi0_sampling_loop():
    noise, actions = _chunks(0)

    def field(x, t):
        return torch.tanh(x) * (1 + t[:, None, None].double()) + actions

    x, dt = noise, -1.0 / 8
    for step in range(8):
        time = 1.0 + step * dt
        x = x + dt * -field(x, torch.full((3,), 1 - time))
    torch.testing.assert_close(euler_integrate(field, noise, 8), x)


def test_loss_by_hand():
    velocity = torch.tensor([[[1.0, 2.0], [0.0, 0.0]], [[3.0, 0.0], [9.0, 9.0]]], requires_grad=True)
    target = torch.zeros_like(velocity)
    is_pad = torch.tensor([[False, False], [False, True]])
    # (1 + 4 + 0 + 0 + 9 + 0) / 6 values that are not padding
    assert flow_matching_loss(velocity, target, is_pad, 10.0).item() == pytest.approx(10 * 14 / 6)
    assert flow_matching_loss(velocity, target).item() == pytest.approx((14 + 162) / 8)
    flow_matching_loss(velocity, target, is_pad, 10.0).backward()
    expected = 10 * 2 / 6 * torch.tensor([[[1.0, 2.0], [0.0, 0.0]], [[3.0, 0.0], [0.0, 0.0]]])
    torch.testing.assert_close(velocity.grad, expected)


def test_loss_of_a_batch_of_padding_is_zero_with_zero_gradients():
    velocity = torch.ones(2, 3, 4, requires_grad=True)
    loss = flow_matching_loss(velocity, torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool), 10.0)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.count_nonzero(velocity.grad) == 0


def test_nan_in_padding_reaches_neither_loss_nor_gradient():
    velocity = torch.ones(1, 2, 2)
    velocity[0, 1] = math.nan
    velocity.requires_grad_()
    loss = flow_matching_loss(velocity, torch.zeros(1, 2, 2), torch.tensor([[False, True]]))
    loss.backward()
    assert loss.item() == 1.0
    assert torch.isfinite(velocity.grad).all()


@given(seed=st.integers(0, 2**31), scale=st.floats(0.1, 100))
@settings(deadline=None, max_examples=30)
def test_loss_ignores_padded_values_and_is_linear_in_scale(seed, scale):
    noise, actions = _chunks(seed)
    is_pad = torch.rand(3, 5, generator=torch.Generator().manual_seed(seed)) < 0.5
    is_pad[0, 0] = False
    raw = flow_matching_loss(noise, actions, is_pad)
    disturbed = torch.where(is_pad[..., None], noise * 7 + 1, noise)
    assert torch.equal(flow_matching_loss(disturbed, actions, is_pad), raw)
    torch.testing.assert_close(flow_matching_loss(noise, actions, is_pad, scale), scale * raw)
    torch.testing.assert_close(raw, ((noise - actions) ** 2)[~is_pad].mean())


def test_half_precision_loss_is_computed_in_float32():
    velocity = torch.full((1, 1, 1), 300.0, dtype=torch.float16)
    loss = flow_matching_loss(velocity, torch.zeros(1, 1, 1))
    assert loss.dtype == torch.float32
    assert loss.item() == 90000.0


@pytest.mark.parametrize("num_steps", [1, 3, 10])
def test_euler_is_exact_on_straight_paths(num_steps):
    noise, actions = _chunks(1)
    times = []

    def field(x, t):
        times.append(t[0].item())
        return actions - noise

    torch.testing.assert_close(euler_integrate(field, noise, num_steps), actions)
    assert times == pytest.approx([step / num_steps for step in range(num_steps)])


def test_euler_converges_at_first_order():
    start = torch.ones(1, 1, 1, dtype=torch.float64)
    errors = [abs(euler_integrate(lambda x, t: -x, start, n).item() - math.exp(-1)) for n in (50, 100, 200)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.02)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.02)


def test_beta_times_follow_openpi():
    t = sample_timesteps(200_000, "beta", generator=torch.Generator().manual_seed(0)).double()
    assert t.dtype == torch.float64
    assert t.min() >= 0
    assert t.max() <= 0.999
    # Beta(1.5, 1) has the distribution function b^1.5, hence the quantiles p^(2/3) of t_pi0 = 0.999 b + 0.001.
    probabilities = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    expected = 0.999 * probabilities ** (2 / 3) + 0.001
    torch.testing.assert_close(torch.quantile(1 - t, probabilities), expected, atol=4e-3, rtol=0)
    assert t.mean().item() == pytest.approx(1 - (0.999 * 0.6 + 0.001), abs=2e-3)


def test_uniform_times_and_determinism():
    t = sample_timesteps(100_000, "uniform", generator=torch.Generator().manual_seed(0))
    assert (t.mean().item(), t.var().item()) == pytest.approx((0.5, 1 / 12), abs=5e-3)
    for distribution in ("beta", "uniform"):
        draws = [sample_timesteps(5, distribution, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
        assert torch.equal(*draws)
        assert draws[0].dtype == torch.float32
        torch.manual_seed(3)
        assert torch.equal(sample_timesteps(5, distribution), draws[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample_timesteps(2, "normal"), "'beta' or 'uniform', found 'normal'"),
        (lambda: sample_timesteps(2, alpha=0.0), "alpha > 0"),
        (lambda: sample_timesteps(2, scale=1.0, offset=0.1), r"stay in \[0, 1\]"),
        (lambda: interpolate(torch.zeros(2, 3, 1), torch.zeros(2, 4, 1), torch.zeros(2)), "same shape"),
        (
            lambda: interpolate(torch.zeros(2, 3, 1), torch.zeros(2, 3, 1), torch.zeros(3)),
            r"shape \(2,\), found \(3,\)",
        ),
        (lambda: flow_matching_loss(torch.zeros(2, 3, 1), torch.zeros(2, 3, 1), torch.zeros(2, 3)), "boolean"),
        (lambda: flow_matching_loss(torch.zeros(2, 3, 1), torch.zeros(1, 3, 1)), "same shape"),
        (lambda: euler_integrate(lambda x, t: x, torch.zeros(1, 1, 1), 0), "at least 1, found 0"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
