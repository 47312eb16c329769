"""Random gradients of predictions, whose second moments are the Gauss-Newton matrix."""

from torch import Tensor


def predictive_cotangent(logits: Tensor, noise: Tensor, temperature: float = 1.0) -> Tensor:
    r"""
    Gradient, with respect to the logits \\(\ell\\), of \\(\sum_c \epsilon_c \sqrt{q_c} (\ell_c - \sum_{c'} q_{c'}
    \ell_{c'})\\) with \\(q = \mathrm{softmax}(\ell / T)\\) held fixed:
    \\(\epsilon_c \sqrt{q_c} - q_c \sum_{c'} \epsilon_{c'} \sqrt{q_{c'}}\\).

    For standard normal noise its second moments are \\(\mathrm{diag}(q) - q q^T\\): \\(T^2\\) times the Hessian
    of \\(\mathrm{KL}(q \| \mathrm{softmax}(\ell / T))\\) in the logits, so that gradients which are computed from it
    have the Gauss-Newton matrix of the predictions at temperature T for their second moments (Martens & Grosse 2015,
    arXiv 1503.05671, for T = 1). A temperature above one keeps it from vanishing where a model is certain.

    Args:
        logits (`Tensor` of shape `(..., V)`): The predictions.
        noise (`Tensor` of shape `(..., V)`): \\(\epsilon\\).
        temperature (`float`, *optional*, defaults to 1.0): T, above 0.

    Returns:
        `Tensor` of shape `(..., V)`: the gradient, detached, in the noise's dtype. It adds up to zero over the
        vocabulary.

    Raises:
        ValueError: If the shapes differ or the temperature is not above 0.
    """
    if logits.shape != noise.shape:
        raise ValueError(
            f"logits and noise must have the same shape, found {tuple(logits.shape)} and {tuple(noise.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, found {temperature}")
    q = (logits.detach().to(noise.dtype) / temperature).softmax(dim=-1)
    weighted = noise * q.sqrt()
    return weighted - q * weighted.sum(dim=-1, keepdim=True)
