"""
Statistics and penalty in half precision and in float32 against float64.

Bounds are roundings times condition. A sum of N terms that is taken pairwise is right to log₂N roundings of the terms'
absolute values; the condition of a standard deviation is ρ, how many of them the mean is away from zero. What would
cost ρ² roundings, such as the difference of mean squares and squared means, is far outside of every bound at ρ = 10⁴.
"""

import math

import pytest
import torch

from hf_aegis.functional.bures import (
    apply_penalty_gradient,
    penalty_gradient_coefficients,
    squared_wasserstein,
    squared_wasserstein_gradient,
)
from hf_aegis.functional.moments import Moments, masked_moments, merge_moments, token_moments


ROUNDING = 2**-24
"""Of float32, in which statistics are computed whatever the hidden states' dtype."""


def hidden_states(tokens, ratio, dtype=torch.float32, width=2, seed=0):
    """`(rows, tokens / rows, width)` with a standard deviation of one and a mean of `ratio`, before rounding."""
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, tokens // 1000)
    return (torch.randn(rows, tokens // rows, width, generator=generator) + ratio).to(dtype)


def exact_moments(hidden):
    tokens = hidden.flatten(0, 1).double()
    return tokens.mean(dim=0), tokens.var(dim=0, unbiased=False)


def errors(mean, variance, exact):
    """Of the mean, in standard deviations, and of the variance, relative; the largest of all dimensions."""
    exact_mean, exact_variance = exact
    of_mean = (mean.double() - exact_mean).abs() / exact_variance.sqrt()
    of_variance = (variance.double() - exact_variance).abs() / exact_variance
    return float(of_mean.max()), float(of_variance.max())


def condition(exact):
    mean, variance = exact
    return float((mean.abs() / variance.sqrt()).max()) + 1


@pytest.mark.parametrize(
    ("dtype", "ratio"),
    [(torch.float32, 0), (torch.float32, 1e4), (torch.bfloat16, 10), (torch.bfloat16, 1000), (torch.float16, 1000)],
)
@pytest.mark.parametrize("padding", [False, True])
def test_a_million_tokens_at_once(dtype, ratio, padding):
    hidden = hidden_states(1_000_000, ratio, dtype)
    mask = None
    if padding:
        mask = torch.rand(hidden.shape[:2], generator=torch.Generator().manual_seed(1)) < 0.9
    exact = exact_moments(hidden if mask is None else hidden[mask].unsqueeze(0))
    roundings = math.log2(1e6) * ROUNDING
    of_mean = roundings * condition(exact)
    for mean, variance in (
        masked_moments(hidden, mask)[:2],
        token_moments(hidden.flatten(0, 1) if mask is None else hidden[mask]),
    ):
        found = errors(mean, variance, exact)
        assert found[0] <= of_mean
        # Deviations are from the rounded mean, whose square is all that this adds.
        assert found[1] <= roundings + of_mean**2


def test_a_million_tokens_in_batches_that_are_merged_in_float32():
    """As the moments of processes are in a training step: no float64 anywhere."""
    batches = [hidden_states(10_000, 1e4, seed=seed) for seed in range(100)]
    exact = exact_moments(torch.cat(batches))
    total = None
    for batch in batches:
        mean, variance, count = masked_moments(batch)
        part = Moments(count, mean, variance * count)
        total = part if total is None else merge_moments(total, part)
    assert total.mean.dtype == total.m2.dtype == torch.float32
    # Each merge rounds the mean once more.
    roundings = (math.log2(1e4) + len(batches)) * ROUNDING
    of_mean, of_variance = errors(total.mean, total.variance, exact)
    assert of_mean <= roundings * condition(exact)
    assert of_variance <= roundings + (roundings * condition(exact)) ** 2


@pytest.mark.parametrize("value", [0.1, -1e4, 65504.0])
def test_a_constant_dimension_varies_by_the_means_rounding_at_most(value):
    hidden = torch.full((100, 1000, 2), value)
    for mean, variance in (masked_moments(hidden)[:2], token_moments(hidden.flatten(0, 1))):
        of_mean = math.log2(1e5) * ROUNDING * abs(value)
        assert (mean - value).abs().max() <= of_mean
        assert variance.max() <= of_mean**2


def test_tiny_variances_are_those_of_the_inputs():
    hidden = hidden_states(10_000, 0) * 1e-12
    assert errors(*masked_moments(hidden)[:2], exact_moments(hidden))[1] <= math.log2(1e4) * ROUNDING


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_one_token_among_padding_is_its_own_mean_bit_for_bit(dtype):
    hidden = hidden_states(2000, 300, dtype)
    hidden[0, 0] = float("nan")
    mask = torch.zeros(hidden.shape[:2])
    mask[1, 7] = 1
    mean, variance, count = masked_moments(hidden, mask)
    assert torch.equal(mean, hidden[1, 7].float())
    assert not variance.any()
    assert count.item() == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_spoils_its_own_dimension_alone(value):
    hidden = hidden_states(1000, 0)
    hidden[0, 3, 1] = value
    for mean, variance in (masked_moments(hidden)[:2], token_moments(hidden.flatten(0, 1))):
        assert torch.isfinite(mean).tolist() == torch.isfinite(variance).tolist() == [True, False]


def test_float16_up_to_its_largest_values():
    """Squares of 65,504 are far outside of float16."""
    hidden = torch.tensor([[[65504.0, 60000.0], [-65504.0, 64000.0]]], dtype=torch.float16)
    mean, variance, _ = masked_moments(hidden)
    exact = exact_moments(hidden)
    assert mean.tolist() == exact[0].tolist()
    torch.testing.assert_close(variance.double(), exact[1], rtol=2 * ROUNDING, atol=0)
    terms = squared_wasserstein(mean, variance, torch.full((2,), -6e4), torch.zeros(2))
    wide = squared_wasserstein(*exact, torch.full((2,), -6e4).double(), torch.zeros(2).double())
    torch.testing.assert_close(torch.stack(terms).double(), torch.stack(wide), rtol=8 * ROUNDING, atol=0)
    gradient = squared_wasserstein_gradient(
        hidden, None, mean, variance, torch.tensor(2.0), torch.full((2,), -6e4), torch.zeros(2)
    )
    assert gradient.dtype == torch.float16
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("dtype", "ratio"), [(torch.float32, 0), (torch.float32, 1e4), (torch.bfloat16, 10), (torch.float16, 100)]
)
def test_the_transport_penalty(dtype, ratio):
    hidden = hidden_states(100_000, ratio, dtype)
    exact = exact_moments(hidden)
    # A little off the anchor, as in training: the distance is a difference of nearly equal numbers.
    anchor = exact[0] + 0.1 * exact[1].sqrt(), exact[1] * 1.2
    mean, variance, count = masked_moments(hidden)
    deviation = float(exact[1].sqrt().max())
    roundings = 2 * math.log2(1e5) * ROUNDING * condition(exact)  # of this batch's statistics, and of the anchor's

    # √W is a norm, so that it is off by no more than the statistics are.
    found = sum(squared_wasserstein(mean, variance, anchor[0].float(), anchor[1].float()))
    expected = sum(squared_wasserstein(*exact, *anchor))
    assert abs(float(found) ** 0.5 - float(expected) ** 0.5) <= roundings * deviation

    leaf = hidden.double().requires_grad_()
    tokens = leaf.flatten(0, 1)
    distance = (tokens.mean(dim=0) - anchor[0]) ** 2
    spread = (tokens.var(dim=0, unbiased=False) + 1e-6).sqrt() - (anchor[1] + 1e-6).sqrt()
    (gradient,) = torch.autograd.grad((distance + spread**2).mean(), leaf)
    shift, slope = penalty_gradient_coefficients(mean, variance, count, anchor[0].float(), anchor[1].float())
    cotangent = apply_penalty_gradient(hidden.float(), None, shift, slope)
    assert (cotangent.double() - gradient).norm() <= 2 * roundings * gradient.norm()
    if dtype == torch.bfloat16:
        rounded = apply_penalty_gradient(hidden, None, shift, slope)
        assert (rounded.double() - gradient).norm() <= (2**-8 + 2 * roundings) * gradient.norm()
