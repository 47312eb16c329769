"""Quadratic penalties that hold parameters near where they started: L2-SP and elastic weight consolidation."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from tqdm.auto import tqdm

from hf_aegis.anchors.collection import evaluation_mode


class QuadraticPenalty:
    r"""
    \\(\frac{\lambda}{2} \sum_i w_i (\theta_i - \theta^*_i)^2\\), where \\(\theta^*\\) are the parameters' values when
    this is made. Its gradient has a closed form, so it needs no backward pass.

    With \\(w = 1\\) it is L2-SP (arXiv 1802.01483), with the diagonal of the Fisher information, see
    [`fisher_diagonal`], elastic weight consolidation (arXiv 1612.00796).

    Args:
        parameters (`Mapping[str, torch.nn.Parameter]`): The parameters that are held, by name.
        scale (`float`): \\(\lambda > 0\\).
        weights (`Mapping[str, Tensor]`, *optional*):
            \\(w \ge 0\\), of each parameter's shape; those of other parameters are not looked at. Ones by default.

    Raises:
        ValueError: If there is no parameter, the scale is not positive, or weights are missing, of another shape,
            negative or not finite.
    """

    def __init__(
        self, parameters: Mapping[str, Parameter], scale: float, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        if not parameters:
            raise ValueError("a penalty on parameters needs at least one")
        if not 0 < scale < float("inf"):
            raise ValueError(f"the penalty's scale must be positive, found {scale}")
        self.parameters = dict(parameters)
        self.scale = scale
        self._start = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._weights = (
            None if weights is None else {name: _checked(weights, name, p) for name, p in parameters.items()}
        )

    @torch.no_grad()
    def value(self) -> Tensor:
        """The penalty at the parameters' present values, `()`, in float32 or better and without a graph."""
        terms = [(self._pull(name) * self._away(name)).sum() for name in self.parameters]
        return 0.5 * self.scale * torch.stack([term.to(terms[0].device) for term in terms]).sum()

    @torch.no_grad()
    def add_gradients(self, factor: float = 1.0) -> None:
        r"""
        Adds \\(\lambda w (\theta - \theta^*)\\) to the parameters' `.grad`, which is made where it is `None`. A
        parameter that does not train any more is left alone.

        Args:
            factor (`float`, *optional*, defaults to `1.0`):
                Factor on the gradient: one over the number of micro-batches if it is added to each of them.
        """
        for name, parameter in self.parameters.items():
            if not parameter.requires_grad:
                continue
            gradient = (factor * self.scale * self._pull(name)).to(parameter.dtype)
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad.add_(gradient)

    def _away(self, name: str) -> Tensor:
        """How far a parameter has come; the difference is taken in float32 or better."""
        parameter, start = self.parameters[name], self._start[name]
        if start.device != parameter.device:  # the model was moved since
            self._start[name] = start = start.to(parameter.device)
        wide = torch.promote_types(parameter.dtype, torch.float32)
        return parameter.detach().to(wide) - start.to(wide)

    def _pull(self, name: str) -> Tensor:
        away = self._away(name)
        if self._weights is None:
            return away
        if (weights := self._weights[name]).device != away.device:
            self._weights[name] = weights = weights.to(away.device)
        return weights * away


def fisher_diagonal(
    model: nn.Module,
    parameters: Mapping[str, Parameter],
    batches: Iterable[Mapping[str, Any]],
    loss: Callable[[nn.Module, Mapping[str, Any]], Tensor] | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    r"""
    Diagonal of the empirical Fisher information: the mean over batches of the squared gradient of the batch's loss,
    \\(F_i = \frac{1}{K} \sum_k (\partial L_k / \partial \theta_i)^2\\) (arXiv 1612.00796).

    With batches of one sample this is the empirical Fisher information itself. With a loss that is the mean over
    \\(b\\) samples, their gradients average before they are squared, which gives about \\(1/b\\) of it where the
    samples' gradients are independent with mean zero. No correction is made for that: use batches of one, or reckon
    with it in the penalty's scale.

    The model is in evaluation mode meanwhile. Its modes, gradients and the random numbers are left as they were.

    Args:
        model (`torch.nn.Module`):
            The pre-trained model.
        parameters (`Mapping[str, torch.nn.Parameter]`):
            Parameters to differentiate with respect to, by name.
        batches (`Iterable[Mapping[str, Any]]`):
            Forward arguments with labels. Tensors are moved to the parameters' device.
        loss (`Callable`, *optional*):
            The scalar loss of `(model, batch)`; `model(**batch).loss` by default.
        progress (`bool`, *optional*, defaults to `True`):
            Shows a progress bar.

    Returns:
        `dict[str, Tensor]`: One tensor per parameter, in float32 or better, on its device; zeros for a parameter that
        the loss does not reach.

    Raises:
        ValueError: If there are no parameters or no batches, or a gradient is not finite.
    """
    if not parameters:
        raise ValueError("the Fisher information needs at least one parameter")
    values = list(parameters.values())
    device = values[0].device
    totals = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in values]
    seen = 0
    cuda = sorted({p.device.index for p in values if p.device.type == "cuda"})
    bar = tqdm(batches, desc="Fisher information", unit="batch", disable=None if progress else True)
    with torch.random.fork_rng(cuda), evaluation_mode(model), torch.enable_grad():
        for seen, batch in enumerate(bar, start=1):
            inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            value = model(**inputs).loss if loss is None else loss(model, inputs)
            gradients = torch.autograd.grad(value, values, allow_unused=True)
            for total, gradient in zip(totals, gradients, strict=True):
                if gradient is not None:
                    total += gradient.to(total.dtype).square()
            # Noticed at its own batch, not as a Fisher information of NaN after the last one.
            if not all(bool(torch.isfinite(g).all()) for g in gradients if g is not None):
                raise ValueError(f"batch {seen - 1}: its loss, {value.item()}, has a gradient that is not finite")
    if not seen:
        raise ValueError("no batches to estimate the Fisher information from: the iterable is empty")
    return {name: total / seen for name, total in zip(parameters, totals, strict=True)}


def _checked(weights: Mapping[str, Tensor], name: str, parameter: Parameter) -> Tensor:
    if name not in weights:
        raise ValueError(f"no weights for the parameter {name!r}, found those of {sorted(weights)}")
    weight = weights[name].detach()
    if weight.shape != parameter.shape:
        raise ValueError(f"weights of {name!r} have shape {tuple(weight.shape)}, expected {tuple(parameter.shape)}")
    if not bool((torch.isfinite(weight) & (weight >= 0)).all()):
        raise ValueError(f"weights of {name!r} must be finite and not negative")
    return weight.to(torch.promote_types(weight.dtype, torch.float32))
