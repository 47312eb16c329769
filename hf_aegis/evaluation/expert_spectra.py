"""Singular values of what experts add to their layers, before and after a training."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_aegis.functional.low_rank import product_singular_values
from hf_aegis.functional.spectral_experts import spread_over_ranks
from hf_aegis.tuners.gse import GSELayer


@dataclass(frozen=True)
class _Factors:
    up: Tensor
    down: Tensor


class ExpertSpectra:
    """
    Keeps a copy of all experts' factors, to compare them with what a training makes of them.

    Args:
        model (`torch.nn.Module`): With experts from [`~tuners.gse.GSEModel`]. Layers are known by their names in the
            base model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._before = {
            name: _Factors(factors.up.clone(), factors.down.clone()) for name, factors in _experts(model).items()
        }

    def compare(self, model: nn.Module) -> dict[str, Any]:
        r"""
        Returns:
            `dict`: Ready for JSON: `layers`, each with its `name` and singular values, largest first: `before` and
            `after` of all experts together, \\(\sum_i s_i B_i A_i\\), and of the `update`, the difference of the two.
        """
        layers = []
        for name, after in _experts(model).items():
            before = self._before[name]
            update = torch.cat((after.up, -before.up), dim=1), torch.cat((after.down, before.down))
            values = {
                "before": product_singular_values(before.up, before.down),
                "after": product_singular_values(after.up, after.down),
                "update": product_singular_values(*update),
            }
            layers.append({"name": name, **{key: found.tolist() for key, found in values.items()}})
        return {"layers": layers}


def _experts(model: nn.Module) -> dict[str, _Factors]:
    """The active adapters' factors, scales in those on the left."""
    found = {}
    for layer in (module for module in model.modules() if isinstance(module, GSELayer)):
        active = [name for name in layer.active_adapters if name in layer.gse_A]
        if active:
            ups = [layer.gse_B[n] * spread_over_ranks(layer.gse_scaling[n], layer.gse_A[n].shape[0]) for n in active]
            found[layer.name] = _Factors(
                torch.cat(ups, dim=1).detach(), torch.cat([layer.gse_A[n] for n in active]).detach()
            )
    return found
