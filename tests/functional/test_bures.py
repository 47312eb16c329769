import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_aegis.functional.bures import (
    apply_penalty_gradient,
    penalty_gradient_coefficients,
    squared_wasserstein,
    squared_wasserstein_gradient,
)
from hf_aegis.functional.moments import masked_moments


def penalty_written_out(hidden, mask, anchor_mean, anchor_variance, eps):
    """The penalty straight from the definition, with boolean indexing instead of masking."""
    tokens = hidden[mask]
    mean = tokens.mean(dim=0)
    variance = tokens.var(dim=0, unbiased=False)
    distance = (mean - anchor_mean) ** 2 + (torch.sqrt(variance + eps) - torch.sqrt(anchor_variance + eps)) ** 2
    return distance.mean()


def make_case(shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 1
    mask = torch.rand(shape[:2], generator=generator) < 0.6
    mask[0, 0] = True
    anchor_mean = torch.randn(shape[2], generator=generator, dtype=torch.float64)
    anchor_variance = torch.rand(shape[2], generator=generator, dtype=torch.float64) * 4
    return hidden.to(dtype), mask, anchor_mean.to(dtype), anchor_variance.to(dtype)


def test_hand_computed_case():
    mean_term, std_term = squared_wasserstein(
        torch.tensor([1.0, 2.0]), torch.tensor([3.0, 8.0]), torch.tensor([0.0, 5.0]), torch.tensor([0.0, 0.0]), eps=1.0
    )
    assert mean_term.item() == pytest.approx((1 + 9) / 2)
    assert std_term.item() == pytest.approx(((2 - 1) ** 2 + (3 - 1) ** 2) / 2)


def test_hand_computed_gradient():
    # Tokens 1 and 3 (and a masked one): μ = 2, σ² = 1, s = √(1 + 3) = 2; anchor μ* = 1, s* = √(1 + 3 - 1 - 2) = 1.
    hidden = torch.tensor([[[1.0], [3.0], [7.0]]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0]])
    mean, variance, count = masked_moments(hidden, mask)
    one = torch.ones(1, dtype=torch.float64)
    gradient = squared_wasserstein_gradient(hidden, mask, mean, variance, count, one, one * -2.0, eps=3.0)
    # 2 (μ - μ*) / N = 1 and 2 (s - s*) / (N s) = 0.5, times H - μ = ∓1.
    torch.testing.assert_close(gradient.flatten(), torch.tensor([0.5, 1.5, 0.0], dtype=torch.float64))


def test_known_optimal_transport_distance():
    # W₂² between N(0, 1) and N(3, 4) is 9 + (1 - 2)²; eps = 0 leaves the textbook distance.
    terms = squared_wasserstein(torch.zeros(1), torch.ones(1), torch.full((1,), 3.0), torch.full((1,), 4.0), eps=0.0)
    assert sum(terms).item() == pytest.approx(10.0)


def test_distance_is_zero_on_the_anchor_and_symmetric():
    mean, variance, other_mean, other_variance = torch.rand(4, 6, dtype=torch.float64)
    assert sum(squared_wasserstein(mean, variance, mean, variance)).item() == 0
    there = squared_wasserstein(mean, variance, other_mean, other_variance)
    back = squared_wasserstein(other_mean, other_variance, mean, variance)
    torch.testing.assert_close(torch.stack(there), torch.stack(back))


def test_stacked_layers_give_one_value_per_layer():
    mean, variance, anchor_mean, anchor_variance = torch.rand(4, 3, 6)
    stacked = squared_wasserstein(mean, variance, anchor_mean, anchor_variance)
    for layer in range(3):
        single = squared_wasserstein(mean[layer], variance[layer], anchor_mean[layer], anchor_variance[layer])
        torch.testing.assert_close(torch.stack([term[layer] for term in stacked]), torch.stack(single))


@settings(max_examples=80, deadline=None)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 6)),
    st.integers(0, 2**31),
    st.sampled_from([1e-6, 1e-3, 1.0]),
)
def test_closed_form_equals_autograd(shape, seed, eps):
    hidden, mask, anchor_mean, anchor_variance = make_case(shape, seed)
    mean, variance, count = masked_moments(hidden, mask)
    found = squared_wasserstein_gradient(hidden, mask, mean, variance, count, anchor_mean, anchor_variance, eps)

    leaf = hidden.clone().requires_grad_()
    value = penalty_written_out(leaf, mask, anchor_mean, anchor_variance, eps)
    (expected,) = torch.autograd.grad(value, leaf)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert torch.count_nonzero(found[~mask]) == 0
    torch.testing.assert_close(
        sum(squared_wasserstein(mean, variance, anchor_mean, anchor_variance, eps)), value.detach()
    )


def test_closed_form_passes_gradcheck():
    class Penalty(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden):
            ctx.save_for_backward(hidden)
            mean, variance, _ = masked_moments(hidden, mask)
            return sum(squared_wasserstein(mean, variance, anchor_mean, anchor_variance, 1e-3))

        @staticmethod
        def backward(ctx, cotangent):
            (hidden,) = ctx.saved_tensors
            statistics = masked_moments(hidden, mask)
            return cotangent * squared_wasserstein_gradient(
                hidden, mask, *statistics, anchor_mean, anchor_variance, 1e-3
            )

    hidden, mask, anchor_mean, anchor_variance = make_case((2, 4, 3), seed=7)
    assert torch.autograd.gradcheck(Penalty.apply, hidden.requires_grad_(), atol=1e-8)


def test_without_a_mask_every_token_counts():
    hidden, _, anchor_mean, anchor_variance = make_case((2, 5, 3), seed=1)
    everything = torch.ones(2, 5)
    statistics = masked_moments(hidden)
    torch.testing.assert_close(
        squared_wasserstein_gradient(hidden, None, *statistics, anchor_mean, anchor_variance),
        squared_wasserstein_gradient(hidden, everything, *statistics, anchor_mean, anchor_variance),
    )


def test_gradient_vanishes_on_the_anchor():
    hidden, mask, _, _ = make_case((2, 6, 4), seed=2)
    mean, variance, count = masked_moments(hidden, mask)
    assert torch.count_nonzero(squared_wasserstein_gradient(hidden, mask, mean, variance, count, mean, variance)) == 0


def test_masked_tokens_get_exactly_zero_even_from_nan():
    hidden, mask, anchor_mean, anchor_variance = make_case((3, 6, 4), seed=3)
    hidden[~mask] = float("nan")
    statistics = masked_moments(hidden, mask)
    gradient = squared_wasserstein_gradient(hidden, mask, *statistics, anchor_mean, anchor_variance)
    assert torch.count_nonzero(gradient[~mask]) == 0
    assert torch.isfinite(gradient).all()


def test_a_constant_dimension_has_a_finite_gradient():
    hidden = torch.full((2, 3, 1), 4.0)
    statistics = masked_moments(hidden)
    gradient = squared_wasserstein_gradient(hidden, None, *statistics, torch.zeros(1), torch.ones(1))
    torch.testing.assert_close(gradient, torch.full((2, 3, 1), 2 * 4 / 6), rtol=1e-3, atol=0)


def test_no_token_at_all_gives_a_zero_gradient():
    hidden = torch.randn(1, 2, 3)
    mask = torch.zeros(1, 2)
    gradient = squared_wasserstein_gradient(hidden, mask, *masked_moments(hidden, mask), torch.ones(3), torch.ones(3))
    assert torch.equal(gradient, torch.zeros(1, 2, 3))


def test_bfloat16_hidden_states_keep_their_dtype_and_float32_accuracy():
    hidden, mask, anchor_mean, anchor_variance = make_case((4, 60, 16), seed=4, dtype=torch.float32)
    hidden = hidden.bfloat16()
    mean, variance, count = masked_moments(hidden, mask)
    shift, slope = penalty_gradient_coefficients(mean, variance, count, anchor_mean, anchor_variance)
    assert shift.dtype == slope.dtype == torch.float32
    found = apply_penalty_gradient(hidden, mask, shift, slope)
    assert found.dtype == torch.bfloat16

    leaf = hidden.double().requires_grad_()
    value = penalty_written_out(leaf, mask, anchor_mean.double(), anchor_variance.double(), 1e-6)
    (expected,) = torch.autograd.grad(value, leaf)
    # Only the final rounding to bfloat16 (2⁻⁸ relative to the largest addend) is lost.
    assert (found.double() - expected).abs().max() <= expected.abs().max() * 2**-8


def test_descending_the_gradient_reaches_the_anchor():
    hidden, mask, anchor_mean, anchor_variance = make_case((2, 8, 3), seed=5)
    anchor_variance += 0.5
    before = penalty_written_out(hidden, mask, anchor_mean, anchor_variance, 1e-6)
    for _ in range(200):
        statistics = masked_moments(hidden, mask)
        hidden = hidden - 5.0 * squared_wasserstein_gradient(hidden, mask, *statistics, anchor_mean, anchor_variance)
    after = penalty_written_out(hidden, mask, anchor_mean, anchor_variance, 1e-6)
    assert after < 1e-8 * before
    assert math.isfinite(after)


def test_wrong_input_is_refused():
    vector = torch.ones(3)
    with pytest.raises(ValueError, match="anchor_mean"):
        squared_wasserstein(vector, vector, torch.ones(4), torch.ones(4))
    with pytest.raises(ValueError, match="eps must not be negative, found -1"):
        squared_wasserstein(vector, vector, vector, vector, eps=-1.0)
    with pytest.raises(ValueError, match="eps must be positive"):
        penalty_gradient_coefficients(vector, vector, torch.tensor(1.0), vector, vector, eps=0.0)
    with pytest.raises(ValueError, match="width 4 need coefficients"):
        apply_penalty_gradient(torch.ones(1, 2, 4), None, vector, vector)
    with pytest.raises(ValueError, match="attention mask has shape"):
        apply_penalty_gradient(torch.ones(1, 2, 3), torch.ones(1, 3), vector, vector)
