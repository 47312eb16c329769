"""Matrix products in the precision of their factors."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision_products(device: torch.device) -> Iterator[None]:
    """
    Matrix products of float32 factors on a device are in float32 for the duration of the block, whatever autocast and
    the setting of TF32 say: rounded to TF32 a product is right to a thousandth only. The settings are those of before
    afterwards.

    Args:
        device (`torch.device`): Where the products are.
    """
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        precision = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            torch.backends.cuda.matmul.fp32_precision = precision
