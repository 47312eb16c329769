"""
Flow matching on action chunks: the straight path from noise to actions, its velocity, the loss and Euler's method.

Time runs from noise to actions: `t = 0` is noise, `t = 1` the action chunk (arXiv 2604.16067). openpi and
transformers' π0 run it the other way: `t_here = 1 - t_pi0` and the velocities have opposite signs, so the two describe
the same path.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor


TimeSampling = Literal["beta", "uniform"]


def interpolate(noise: Tensor, actions: Tensor, timestep: Tensor) -> Tensor:
    """
    The point `x_t = (1 - t) ε + t a` of the straight path from noise to actions (arXiv 2604.16067).

    Args:
        noise (`Tensor` of shape `(B, ...)`): ε.
        actions (`Tensor` of shape `(B, ...)`): a, normalised.
        timestep (`Tensor` of shape `(B,)`): t in [0, 1]; 0 is noise.

    Returns:
        `Tensor` of the shape of `actions`.

    Raises:
        ValueError: the shapes do not fit.
    """
    _require_same_shape("noise", noise, "actions", actions)
    if timestep.shape != actions.shape[:1]:
        raise ValueError(f"timestep must have shape {tuple(actions.shape[:1])}, found {tuple(timestep.shape)}")
    t = timestep.reshape(-1, *[1] * (actions.ndim - 1))
    return (1 - t) * noise + t * actions


def target_velocity(noise: Tensor, actions: Tensor) -> Tensor:
    """
    The velocity `u = a - ε` of the straight path, the same at every time (arXiv 2604.16067).

    Args:
        noise (`Tensor` of shape `(B, ...)`): ε.
        actions (`Tensor` of shape `(B, ...)`): a, normalised.

    Raises:
        ValueError: the shapes differ.
    """
    _require_same_shape("noise", noise, "actions", actions)
    return actions - noise


def sample_timesteps(
    batch_size: int,
    distribution: TimeSampling = "beta",
    *,
    alpha: float = 1.5,
    beta: float = 1.0,
    scale: float = 0.999,
    offset: float = 0.001,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """
    Draws the times at which the flow is trained.

    `"beta"` is openpi's `t_pi0 = scale · Beta(alpha, beta) + offset` turned into our direction of time,
    `t = 1 - t_pi0`: with the defaults times lie in [0, 0.999], are denser towards the noise and have mean 0.3996.
    `"uniform"` draws from [0, 1) and reads none of the four parameters.

    Args:
        batch_size (`int`): number of times.
        distribution (`"beta"` or `"uniform"`, *optional*, defaults to `"beta"`): as above.
        alpha, beta (`float`, *optional*, default to `1.5` and `1.0`): of the Beta distribution, positive.
        scale, offset (`float`, *optional*, default to `0.999` and `0.001`): of openpi; they must keep t in [0, 1].
        device (`torch.device` or `str`, *optional*): where the times are drawn and returned.
        generator (`torch.Generator`, *optional*): of that device; torch's global one when not given.

    Returns:
        `Tensor` of shape `(batch_size,)`, float32.

    Raises:
        ValueError: an unknown distribution, or parameters out of range.
    """
    if distribution == "uniform":
        return torch.rand(batch_size, device=device, generator=generator)
    if distribution != "beta":
        raise ValueError(f"distribution must be 'beta' or 'uniform', found {distribution!r}")
    check_beta_sampling(alpha, beta, scale, offset)
    # A Beta variable is X / (X + Y) of two Gamma variables. torch.distributions.Beta takes no generator, and torch has
    # no public Gamma sampler.
    shapes = torch.tensor([alpha, beta], device=device).expand(batch_size, 2).contiguous()
    gammas = torch._standard_gamma(shapes, generator=generator)
    drawn = gammas[:, 0] / gammas.sum(dim=1)
    return 1 - (scale * drawn + offset)


def check_beta_sampling(alpha: float, beta: float, scale: float, offset: float) -> None:
    """
    Checks the parameters of the `"beta"` distribution of times.

    Raises:
        ValueError: the shape parameters are not positive, or `scale` and `offset` would leave [0, 1].
    """
    if not (alpha > 0 and beta > 0):
        raise ValueError(f"the Beta distribution of times needs alpha > 0 and beta > 0, found {alpha} and {beta}")
    if not (scale > 0 and offset >= 0 and scale + offset <= 1):
        raise ValueError(
            "times must stay in [0, 1]: need scale > 0, offset >= 0 and scale + offset <= 1, "
            f"found scale {scale} and offset {offset}"
        )


def flow_matching_loss(velocity: Tensor, target: Tensor, is_pad: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """
    `L_FM = s · mean((v - u)²)` over the action steps that are not padding (arXiv 2604.16067).

    The mean is taken over all values of the whole batch, so a step counts the same in a long and in a short chunk.
    A batch in which every step is padding has loss 0 and zero gradients: an error would need the mask on the host at
    every step, and a division by zero would poison the run. What stands in padded steps, NaN included, reaches neither
    the loss nor a gradient.

    Args:
        velocity (`Tensor` of shape `(B, H, A)`): v, predicted.
        target (`Tensor` of shape `(B, H, A)`): u, see [`target_velocity`].
        is_pad (`Tensor` of shape `(B, H)`, bool, *optional*): `True` where the step lies past the episode's end.
        scale (`float`, *optional*, defaults to `1.0`): s; `1.0` gives the raw mean squared error.

    Returns:
        `Tensor`, a scalar; float32 when `velocity` is half-precision.

    Raises:
        ValueError: the shapes do not fit, or `is_pad` is not boolean.
    """
    _require_same_shape("velocity", velocity, "target", target)
    difference = velocity.to(torch.promote_types(velocity.dtype, torch.float32)) - target
    if is_pad is None:
        return scale * difference.square().mean()
    if is_pad.dtype != torch.bool or is_pad.shape != velocity.shape[:-1]:
        raise ValueError(
            f"is_pad must be boolean of shape {tuple(velocity.shape[:-1])}, "
            f"found {is_pad.dtype} of shape {tuple(is_pad.shape)}"
        )
    difference = difference.masked_fill(is_pad.unsqueeze(-1), 0.0)
    count = (~is_pad).sum() * velocity.shape[-1]
    return scale * difference.square().sum() / count.clamp(min=1)


def euler_integrate(velocity_fn: Callable[[Tensor, Tensor], Tensor], noise: Tensor, num_steps: int) -> Tensor:
    """
    Follows the velocity field from `t = 0` (noise) to `t = 1` (actions) in equal Euler steps; exact where the
    velocity is constant along the path.

    Args:
        velocity_fn (`Callable`): maps `x` of the shape of `noise` and `t` of shape `(B,)`, float32, to the velocity.
        noise (`Tensor` of shape `(B, ...)`): the start.
        num_steps (`int`): number of steps, at least 1. The field is evaluated at 0, 1/n, …, (n-1)/n.

    Returns:
        `Tensor` of the shape of `noise`: the state at `t = 1`.

    Raises:
        ValueError: `num_steps` is below 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, found {num_steps}")
    x = noise
    for step in range(num_steps):
        t = torch.full((noise.shape[0],), step / num_steps, dtype=torch.float32, device=noise.device)
        x = x + velocity_fn(x, t) / num_steps
    return x


def _require_same_shape(first: str, a: Tensor, second: str, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"{first} and {second} must have the same shape, found {tuple(a.shape)} and {tuple(b.shape)}")
