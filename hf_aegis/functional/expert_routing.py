"""Top-k routing of tokens to experts, and how evenly it loads them."""

import torch
from torch import Tensor


def top_k_gate(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    r"""
    Dense gate weights: \\(p = \operatorname{softmax}(logits)\\), of which the k largest are kept and renormalised to
    a sum of one.

    Args:
        logits (`Tensor` of shape `(..., E)`): Of any dtype; computed in float32 or better.
        top_k (`int`): k, from 1 to E.

    Returns:
        `tuple[Tensor, Tensor, Tensor]`: gate, probabilities p, and what was selected, as ones and zeros without
        gradient: each `(..., E)`. Gradients reach the logits of all experts through p.
    """
    probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)
    indices = probabilities.detach().topk(top_k, dim=-1).indices
    selected = torch.zeros_like(probabilities).scatter(-1, indices, 1.0)
    kept = probabilities * selected
    return kept / kept.sum(dim=-1, keepdim=True), probabilities, selected


def token_mean(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """
    Mean over all tokens that count.

    Args:
        values (`Tensor` of shape `(..., E)`): Of each token.
        mask (`Tensor` of shape `(...)`, *optional*): Not zero for tokens that count; by default all do.

    Returns:
        `Tensor` of shape `(E,)`: zeros where none counts.
    """
    if mask is None:
        return values.flatten(end_dim=-2).mean(dim=0) if values.dim() > 1 else values
    weights = (mask != 0).to(values).unsqueeze(-1)
    return (values * weights).flatten(end_dim=-2).sum(dim=0) / weights.sum().clamp(min=1.0)


def load_balance_loss(load: Tensor, probability: Tensor) -> Tensor:
    r"""
    \\(n_s \sum_j f_j P_j\\), where \\(f_j\\) is the share of tokens that expert j gets and \\(P_j\\) its mean
    probability (Fedus, Zoph & Shazeer 2022, arXiv 2101.03961, equation 4; for k experts a token, shares sum to k).

    Its value is k for an even load, and up to \\(n_s\\) where all tokens go to the same experts.

    Args:
        load (`Tensor` of shape `(E,)`): \\(f\\).
        probability (`Tensor` of shape `(E,)`): \\(P\\), through which the gradient goes.
    """
    return load.shape[-1] * (load * probability).sum()


def routing_entropy(probabilities: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""
    Mean entropy of the tokens' routing, \\(-\sum_j p_j \ln p_j\\), in nats: from 0 to \\(\ln E\\).

    Args:
        probabilities (`Tensor` of shape `(..., E)`): p of each token.
        mask (`Tensor` of shape `(...)`, *optional*): As in [`token_mean`].
    """
    return token_mean(torch.special.entr(probabilities).sum(dim=-1, keepdim=True), mask).squeeze(-1)
