"""Principal subspaces of second moments: their rank, their angles, and how they come from sketches and merge."""

import torch
from torch import Tensor


def rank_for_energy(energies: Tensor, total: float, energy: float, min_rank: int, max_rank: int) -> int:
    """
    The fewest leading directions that hold a share of the energy: the least k with `Σ_{j ≤ k} e_j ≥ energy · total`.

    Args:
        energies (`Tensor` of shape `(k,)`): Energies of the directions, not negative, largest first.
        total (`float`): The total energy; at least the sum of `energies`, but for rounding.
        energy (`float`): The share to hold, above 0 and at most 1.
        min_rank, max_rank (`int`): Bounds on the result, whatever the energy.

    Returns:
        `int`: between `min_rank` and `max_rank`, but never more than there are directions. All of them where they hold
        less than the share.

    Raises:
        ValueError: If `energies` is not a vector with entries, or an argument is out of range.
    """
    if energies.dim() != 1 or energies.numel() == 0:
        raise ValueError(f"energies must be a vector with at least one entry, found shape {tuple(energies.shape)}")
    if not 0 < energy <= 1:
        raise ValueError(f"energy must be above 0 and at most 1, found {energy}")
    if not 1 <= min_rank <= max_rank:
        raise ValueError(f"ranks need 1 <= min_rank <= max_rank, found {min_rank} and {max_rank}")
    held = energies.detach().cpu().double().cumsum(dim=0)
    # What rounding takes from the sum must not ask for directions without energy.
    wanted = energy * total * (1 - len(held) * torch.finfo(torch.float64).eps)
    needed = int((held < wanted).sum()) + 1
    return min(max(needed, min_rank), max_rank, len(held))
