import pytest
import torch

from hf_aegis.functional import inner_product as module
from hf_aegis.functional.inner_product import inner_product


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [7, 1 << 24])
def test_inner_product(dtype, chunk, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    first, second = torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = inner_product(first, second.t().contiguous().t())
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = (first.double() * second.double()).sum()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_half_precision_squares_do_not_overflow():
    assert inner_product(
        torch.full((9,), 300.0, dtype=torch.float16), torch.full((9,), 300.0, dtype=torch.float16)
    ) == (9 * 90000.0)
