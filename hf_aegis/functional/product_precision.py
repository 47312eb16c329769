"""Matrix products in the precision of their factors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision_products(device: torch.device) -> Iterator[None]:
    """
    Matrix products of float32 factors on a device are in float32 for the duration of the block, whatever autocast and
    `torch.set_float32_matmul_precision` say: rounded to TF32 or bfloat16, which CPUs with matrix units do too, a
    product is right to a thousandth only. The settings are those of before afterwards.

    Args:
        device (`torch.device`): Where the products are.
    """
    # Its stubs leave oneDNN's matmul out.
    mkldnn: Any = torch.backends.mkldnn
    backends = {"cpu": mkldnn.matmul, "cuda": torch.backends.cuda.matmul}
    with torch.autocast(device.type, enabled=False):
        if device.type not in backends:
            yield
            return
        backend = backends[device.type]
        precision = backend.fp32_precision
        backend.fp32_precision = "ieee"
        try:
            yield
        finally:
            backend.fp32_precision = precision
