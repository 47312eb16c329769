"""Products in full precision where autocast and TF32 would have them otherwise."""

import pytest
import torch

from hf_aegis.functional.product_precision import full_precision_products


@pytest.fixture
def tf32():
    """TF32 is on, as users have it for training; the setting exists without a GPU."""
    precision = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = precision


def test_autocast_is_off():
    factors = torch.randn(2, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with full_precision_products(torch.device("cpu")):
            product = factors[0] @ factors[1]
        assert (factors[0] @ factors[1]).dtype == torch.bfloat16
    assert product.dtype == torch.float32


@pytest.fixture
def bf16_products():
    """What `torch.set_float32_matmul_precision("medium")` sets for CPUs; also on those that ignore it."""
    precision = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    yield
    torch.backends.mkldnn.matmul.fp32_precision = precision


@pytest.mark.usefixtures("bf16_products")
def test_bfloat16_is_off_on_cpus_and_then_as_before():
    settings, factors = torch.backends.mkldnn.matmul, torch.randn(2, 512, 512)
    exact = factors[0].double() @ factors[1].double()
    with full_precision_products(torch.device("cpu")):
        assert settings.fp32_precision == "ieee"
        product = factors[0] @ factors[1]
    assert settings.fp32_precision == "bf16"
    # Each element is a sum of 512 products; their rounding errors walk at random.
    assert float((product - exact).norm() / exact.norm()) < 2**-24 * 512**0.5


@pytest.mark.usefixtures("tf32")
def test_tf32_is_off_on_gpus_and_then_as_before():
    settings = torch.backends.cuda.matmul
    with full_precision_products(torch.device("cpu")):
        assert settings.fp32_precision == "tf32"
    with full_precision_products(torch.device("cuda")):
        assert settings.fp32_precision == "ieee"
    assert settings.fp32_precision == "tf32"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.usefixtures("tf32")
def test_products_on_gpus_are_right_to_float32():
    factors = torch.randn(2, 512, 512, device="cuda")
    with full_precision_products(factors.device):
        product = factors[0] @ factors[1]
    exact = factors[0].double() @ factors[1].double()
    assert float((product - exact).norm() / exact.norm()) < 1e-5
