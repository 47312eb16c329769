"""The metric in which an optimiser of Adam's kind takes its steps."""

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer


class AdamMetric:
    r"""
    Weights for inner products of gradients, \\(\langle a, b \rangle_P = \sum_i P_i a_i b_i\\), with Adam's rescaling
    \\(P = 1 / (\sqrt{\hat v} + \epsilon)\\) (arXiv 1412.6980) as it stands before the step.

    A gradient \\(g'\\) that is projected off \\(r\\) in this metric has \\(\langle P g', r \rangle = 0\\): it is the
    rescaled gradient, and no longer the gradient itself, that does not work against \\(r\\). Momentum is no part of
    it.

    ```python
    shield.metric = AdamMetric(model, optimizer)
    ```

    Args:
        model (`torch.nn.Module`): Whose parameters the optimiser has.
        optimizer (`torch.optim.Optimizer`): Keeps `exp_avg_sq` and `step`, as `Adam` and `AdamW` do.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._parameters = dict(model.named_parameters())
        self._optimizer = optimizer
        # The groups themselves are replaced when an optimiser's state is loaded.
        self._group_of = {p: index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}

    def __call__(self, name: str) -> Tensor | None:
        """
        The weights of the parameter `name`'s elements; `None`, all alike, before the optimiser's first step.

        Raises:
            ValueError: If the optimiser keeps no mean of squared gradients, or no exact one.
        """
        parameter = self._parameters[name]
        state: dict[str, Any] = self._optimizer.state.get(parameter, {})
        if not state:
            return None
        squares, steps = state.get("exp_avg_sq"), state.get("step")
        if squares is None or steps is None:
            raise ValueError(
                f"the metric of Adam needs `exp_avg_sq` and `step` of {name}, but {type(self._optimizer).__name__} "
                f"keeps {sorted(state)}"
            )
        group = self._optimizer.param_groups[self._group_of[parameter]]
        unbiased = squares / (1 - group["betas"][1] ** steps)
        return unbiased.sqrt_().add_(group["eps"]).reciprocal_()
