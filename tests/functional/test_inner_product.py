"""Inner products against float64: whatever the dtype, the size and the sign of the terms."""

import pytest
import torch

from hf_aegis.functional import inner_product as module
from hf_aegis.functional.inner_product import inner_product


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [7, 1 << 24])
def test_inner_product(dtype, chunk, monkeypatch):
    monkeypatch.setattr(module, "_CPU_CHUNK", chunk)
    first, second = torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = inner_product(first, second.t().contiguous().t())
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = (first.double() * second.double()).sum()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_nothing_has_no_inner_product():
    assert inner_product(torch.zeros(0, 3), torch.zeros(0, 3)).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_squared_norm_of_a_large_gradient(dtype):
    # As many as a weight of a 2B decoder's MLP has; all terms have one sign, so that no rounding makes up for another.
    gradient = torch.rand(2304 * 9216, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = sum(float(part.double().square().sum()) for part in gradient.split(1 << 20))
    # A chunk's terms go to at least 16 accumulators, each of which walks at random: √(2¹⁸ / 16) roundings of 2⁻²⁴;
    # twice that, as products of bfloat16 numbers round to one side. Chunks are added pairwise. One dot product of all
    # terms is off by ten times the bound and more.
    bound = 2 * 2**-24 * (2**18 / 16) ** 0.5
    assert abs(float(inner_product(gradient, gradient)) / expected - 1) < bound


def test_half_precision_squares_do_not_overflow():
    largest = torch.full((9,), torch.finfo(torch.float16).max, dtype=torch.float16)
    assert inner_product(largest, largest) == 9 * 65504.0**2
