import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_aegis.functional.moments import Moments, masked_moments, merge_moments


shapes = st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 6))


def oracle(tokens: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Moments of `(N, D)` tokens by NumPy, in float64."""
    array = tokens.double().numpy()
    return array.mean(axis=0), array.var(axis=0)


def no_tokens(width: int) -> Moments:
    return Moments(*(torch.zeros(shape, dtype=torch.float64) for shape in ((), (width,), (width,))))


def moments_of(hidden: torch.Tensor) -> Moments:
    mean, variance, count = masked_moments(hidden)
    return Moments(count.double(), mean.double(), variance.double() * count.double())


def test_hand_computed_case():
    hidden = torch.tensor([[[1.0, 10.0], [3.0, 20.0], [99.0, 99.0]], [[5.0, 60.0], [99.0, 99.0], [99.0, 99.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    mean, variance, count = masked_moments(hidden, mask)
    assert count.item() == 3
    torch.testing.assert_close(mean, torch.tensor([3.0, 30.0]))
    torch.testing.assert_close(variance, torch.tensor([8.0 / 3, 1400.0 / 3]))  # population variance: over N, not N - 1


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 2**31), st.sampled_from([torch.bool, torch.int64, torch.float32]))
def test_masked_moments_match_numpy(shape, seed, mask_dtype):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 5
    mask = torch.rand(shape[:2], generator=generator) < 0.6
    mask[0, 0] = True
    mean, variance, count = masked_moments(hidden, mask.to(mask_dtype))
    expected_mean, expected_variance = oracle(hidden[mask])
    assert count.item() == mask.sum().item()
    np.testing.assert_allclose(mean.numpy(), expected_mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(variance.numpy(), expected_variance, rtol=1e-11, atol=1e-12)


def test_without_a_mask_every_token_counts():
    hidden = torch.randn(2, 3, 4)
    for found, expected in zip(masked_moments(hidden), masked_moments(hidden, torch.ones(2, 3)), strict=True):
        torch.testing.assert_close(found, expected)


def test_masked_positions_may_hold_anything():
    hidden = torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    spoiled = hidden.clone()
    spoiled[0, 2], spoiled[0, 3], spoiled[1, 3] = float("nan"), float("inf"), -1e30
    for found, expected in zip(masked_moments(spoiled, mask), masked_moments(hidden, mask), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_arithmetic_is_float32_or_better(dtype, expected):
    hidden = (torch.randn(4, 300, 8) + 50).to(dtype)
    mean, variance, count = masked_moments(hidden, torch.ones(4, 300))
    assert {mean.dtype, variance.dtype, count.dtype} == {expected}
    expected_mean, expected_variance = oracle(hidden.flatten(0, 1))
    np.testing.assert_allclose(mean.numpy(), expected_mean, rtol=1e-5)
    np.testing.assert_allclose(variance.numpy(), expected_variance, rtol=1e-4)


def test_large_mean_does_not_swallow_the_variance():
    hidden = torch.randn(2, 500, 4) + 1e4
    _, variance, _ = masked_moments(hidden)
    np.testing.assert_allclose(variance.numpy(), oracle(hidden.flatten(0, 1))[1], rtol=1e-3)
    # The textbook E[x²] - E[x]² is far off at this mean in float32, so the tolerance above can tell the two apart.
    naive = hidden.square().mean(dim=(0, 1)) - hidden.mean(dim=(0, 1)).square()
    assert not np.allclose(naive.numpy(), oracle(hidden.flatten(0, 1))[1], rtol=1e-1)


def test_no_token_at_all_gives_zeros():
    hidden = torch.full((1, 2, 3), float("nan"))
    for value in masked_moments(hidden, torch.zeros(1, 2)):
        assert torch.equal(value, torch.zeros_like(value))


def test_moments_are_differentiable():
    hidden = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]])
    assert torch.autograd.gradcheck(lambda h: masked_moments(h, mask)[:2], hidden)


@pytest.mark.parametrize(
    ("hidden", "mask"),
    [
        (torch.zeros(2, 3, 4), torch.ones(2, 4)),
        (torch.zeros(2, 3, 4), torch.ones(2, 1, 3, 3)),
        (torch.zeros(3, 4), None),
        (torch.zeros(2, 3, 4, dtype=torch.int64), None),
    ],
)
def test_shapes_that_do_not_fit_are_refused(hidden, mask):
    with pytest.raises(ValueError, match="hidden states"):
        masked_moments(hidden, mask)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(0, 2**31))
def test_merging_parts_equals_the_whole_in_any_grouping(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(1, size, 3, generator=generator, dtype=torch.float64) * 2 - 7 for size in sizes]
    whole = torch.cat(parts, dim=1)
    left = right = no_tokens(3)
    for part in parts:
        left = merge_moments(left, moments_of(part))
    for part in reversed(parts):
        right = merge_moments(moments_of(part), right)
    mean, variance, count = masked_moments(whole)
    for merged in (left, right):
        torch.testing.assert_close(merged.count, count)
        torch.testing.assert_close(merged.mean, mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(merged.variance, variance, rtol=1e-11, atol=1e-12)


def test_the_empty_set_is_neutral():
    moments = moments_of(torch.randn(2, 5, 4))
    for merged in (merge_moments(moments, no_tokens(4)), merge_moments(no_tokens(4), moments)):
        for found, expected in zip(merged, moments, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-15, atol=0)


def test_a_million_tokens_far_from_zero():
    generator = torch.Generator().manual_seed(0)
    chunks = [torch.randn(10, 1000, 4, generator=generator) * 0.5 + 2000 for _ in range(100)]
    moments = no_tokens(4)
    for chunk in chunks:
        moments = merge_moments(moments, moments_of(chunk))
    expected_mean, expected_variance = oracle(torch.cat(chunks).flatten(0, 1))
    assert moments.count.item() == 1_000_000
    np.testing.assert_allclose(moments.mean.numpy(), expected_mean, rtol=1e-7)
    np.testing.assert_allclose(moments.variance.numpy(), expected_variance, rtol=1e-4)


def test_stacked_layers_merge_like_single_layers():
    first, second = ([moments_of(torch.randn(1, n, 3)) for _ in range(2)] for n in (4, 9))

    def stack(layers):
        return Moments(*(torch.stack([getattr(layer, field) for layer in layers]) for field in Moments._fields))

    stacked_first, stacked_second = (m._replace(count=m.count.unsqueeze(-1)) for m in (stack(first), stack(second)))
    merged = merge_moments(stacked_first, stacked_second)
    for layer in range(2):
        expected = merge_moments(first[layer], second[layer])
        assert torch.equal(merged.mean[layer], expected.mean)
        assert torch.equal(merged.variance[layer], expected.variance)


def test_different_widths_do_not_merge():
    with pytest.raises(ValueError, match=r"\(3,\) and \(4,\)"):
        merge_moments(no_tokens(3), no_tokens(4))
