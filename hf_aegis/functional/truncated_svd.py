"""The leading singular triplets of a matrix, exactly or from a random sketch of its range."""

from typing import Literal, get_args

import torch
from torch import Tensor


SVDMethod = Literal["exact", "randomized"]
SVD_METHODS: tuple[SVDMethod, ...] = get_args(SVDMethod)


def truncated_svd(
    matrix: Tensor,
    rank: int,
    *,
    method: SVDMethod = "exact",
    seed: int = 0,
    oversampling: int = 16,
    power_iterations: int = 4,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""
    The best approximation of a rank, \\(W \approx U \operatorname{diag}(S) V^T\\).

    `"randomized"` is algorithm 4.4 of Halko, Martinsson & Tropp (2011), arXiv 0909.4061: the range of
    \\((W W^T)^q W \Omega\\), orthonormalised after each product, then the exact SVD of W within it. Its error falls
    with the gap after the sketched directions, to the power of \\(2 q + 1\\).

    Args:
        matrix (`Tensor` of shape `(M, N)`): \\(W\\), of any floating dtype; computed in float32 or better, on the
            matrix's device.
        rank (`int`): Triplets to return, R.
        method (`"exact"` or `"randomized"`, *optional*, defaults to `"exact"`): How.
        seed (`int`, *optional*, defaults to `0`): Of the sketch; the same on every device. The global random state is
            neither read nor changed.
        oversampling (`int`, *optional*, defaults to `16`): Sketched directions beyond the rank.
        power_iterations (`int`, *optional*, defaults to `4`): \\(q\\).

    Returns:
        `tuple[Tensor, Tensor, Tensor]`: U `(M, R)`, S `(R,)`, largest first, and V transposed, `(R, N)`.

    Raises:
        ValueError: If the method is unknown or the rank is not between 1 and the lesser of M and N.
    """
    if method not in SVD_METHODS:
        raise ValueError(f"method must be one of {SVD_METHODS}, found {method!r}")
    if not 1 <= rank <= min(matrix.shape):
        raise ValueError(f"rank must lie between 1 and {min(matrix.shape)}, found {rank}")
    wide = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
    if method == "exact":
        left, values, right = torch.linalg.svd(wide, full_matrices=False)
    else:
        basis = _range_basis(wide, min(rank + oversampling, *wide.shape), seed, power_iterations)
        left, values, right = torch.linalg.svd(basis.mT @ wide, full_matrices=False)
        left = basis @ left[:, :rank]
    return left[:, :rank], values[:rank], right[:rank]


def _range_basis(matrix: Tensor, width: int, seed: int, power_iterations: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn(matrix.shape[1], width, generator=generator, dtype=matrix.dtype).to(matrix.device)
    basis = torch.linalg.qr(matrix @ sketch)[0]
    for _ in range(power_iterations):
        basis = torch.linalg.qr(matrix.mT @ basis)[0]
        basis = torch.linalg.qr(matrix @ basis)[0]
    return basis
