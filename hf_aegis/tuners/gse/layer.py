"""Generalized and specialized experts around a linear layer."""

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from hf_aegis.functional.expert_routing import top_k_gate
from hf_aegis.functional.spectral_experts import (
    SpectralExperts,
    expert_ranks,
    plain_scales,
    spectral_experts,
    spread_over_ranks,
)
from hf_aegis.functional.truncated_svd import truncated_svd
from hf_aegis.tuners.gse.base_weights import decoded_weight
from hf_aegis.tuners.gse.config import GSEConfig
from hf_aegis.tuners.gse.routing_log import RoutingLog


class GSELayer(BaseTunerLayer):
    r"""
    What any layer with experts holds, by adapter.

    Attributes:
        name (`str`): The layer's name in the base model.
        gse_A (`Parameter` of shape `(r, in_features)`): All experts' \\(A\\), stacked.
        gse_B (`Parameter` of shape `(out_features, r)`): All experts' \\(B\\), side by side.
        gse_router (`Parameter` of shape `(n_s, in_features)`): Only where there are specialized experts.
        gse_scaling (`Parameter` of shape `(E,)`): The experts' scales \\(s\\), frozen.
        gse_backbone_A, gse_backbone_B (`Parameter`):
            Of the shapes of `gse_A` and `gse_B`, frozen: the low-rank term that is taken off the base layer's output.
            Only where there is a `backbone_adjustment`.
        gse_config (`dict[str, GSEConfig]`): The configurations.
    """

    adapter_layer_names: tuple[str, ...] = ("gse_A", "gse_B", "gse_router")
    other_param_names: tuple[str, ...] = ("gse_scaling", "gse_backbone_A", "gse_backbone_B", "gse_config")

    def __init__(self, base_layer: nn.Module, name: str, routing: RoutingLog) -> None:
        self.base_layer = base_layer
        self.gse_A = nn.ParameterDict()
        self.gse_B = nn.ParameterDict()
        self.gse_router = nn.ParameterDict()
        # Parameters and not buffers: DDP sends buffers around in each step.
        self.gse_scaling = nn.ParameterDict()
        self.gse_backbone_A = nn.ParameterDict()
        self.gse_backbone_B = nn.ParameterDict()
        self.gse_config: dict[str, GSEConfig] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.name = name
        self._routing = routing
        # Adapters whose weights are to be loaded, with the placeholder of `gse_A`: some loaders fill it, others put
        # another parameter in its place.
        self._awaiting: dict[str, nn.Parameter] = {}
        base: Any = self.get_base_layer()
        if isinstance(base, Conv1D):
            self.in_features, self.out_features = base.weight.shape
        else:
            self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def is_quantized(self) -> bool:
        """Whether the base layer's weight has to be decoded to be read."""
        weight: Any = self.get_base_layer().weight
        return not weight.is_floating_point() or type(weight).__module__.startswith("torchao.")

    def base_weight(self) -> Tensor:
        """The base layer's weight `(out_features, in_features)`, decoded where it is quantised."""
        base = self.get_base_layer()
        weight = decoded_weight(base)
        return weight.mT if isinstance(base, Conv1D) else weight

    def update_layer(self, adapter_name: str, config: GSEConfig) -> None:
        """
        Adds an adapter, whose weights are zero until [`~GSELayer.reset_gse_parameters`] or loading sets them.

        Raises:
            ValueError: If the layer is too small for the adapter's rank.
        """
        if config.r > min(self.in_features, self.out_features):
            raise ValueError(
                f"{self.name}: r={config.r}, but a weight of shape {(self.out_features, self.in_features)} has a "
                "rank of its lesser side at most; choose a smaller r, or leave the layer out with exclude_modules"
            )
        weight: Any = self.get_base_layer().weight
        # Not in the base layer's dtype: a decomposition rounded to bfloat16 would be lost.
        options: Any = {
            "device": weight.device,
            "dtype": torch.promote_types(weight.dtype, torch.float32) if not self.is_quantized else torch.float32,
        }
        self.gse_config[adapter_name] = config
        self.gse_A[adapter_name] = nn.Parameter(torch.zeros(config.r, self.in_features, **options))
        self.gse_B[adapter_name] = nn.Parameter(torch.zeros(self.out_features, config.r, **options))
        self.gse_scaling[adapter_name] = _frozen(torch.zeros(config.num_experts, **options))
        if config.num_specialized:
            router = torch.zeros(config.num_specialized, self.in_features, **options)
            self.gse_router[adapter_name] = nn.Parameter(router)
        if config.init_weights and config.backbone_adjustment != "none":
            for factors, like in ((self.gse_backbone_A, self.gse_A), (self.gse_backbone_B, self.gse_B)):
                factors[adapter_name] = _frozen(torch.zeros_like(like[adapter_name]))
        if config.awaits_weights:
            self._awaiting[adapter_name] = self.gse_A[adapter_name]
        self.set_adapter(self.active_adapters)

    @torch.no_grad()
    def reset_gse_parameters(self, adapter_name: str) -> None:
        """
        Gives an adapter the weights that it starts with.

        Raises:
            ValueError: If the base layer's weight has a lesser rank than the adapter.
        """
        config = self.gse_config[adapter_name]
        if config.num_specialized:
            _init_like_linear(self.gse_router[adapter_name])
        if config.init_weights:
            self._set_experts(adapter_name, self._decompose(config))
        else:
            _init_like_linear(self.gse_A[adapter_name])
            scales = plain_scales(expert_ranks(config.r, config.num_experts), self.in_features, config.eta)
            self.gse_scaling[adapter_name].copy_(scales)

    def _decompose(self, config: GSEConfig) -> SpectralExperts:
        left, values, right = truncated_svd(
            self.base_weight(),
            config.r,
            method=config.svd,  # type: ignore[arg-type]
            seed=config.svd_seed,
            oversampling=config.svd_oversampling,
            power_iterations=config.svd_power_iterations,
        )
        resolution = torch.finfo(values.dtype).eps * max(self.in_features, self.out_features)
        rank = int((values > values[0] * resolution).sum())
        if rank < config.r:
            raise ValueError(
                f"{self.name}: r={config.r}, but its weight has a rank of {rank} only, so that some experts would "
                "start from nothing; choose a smaller r, or leave the layer out with exclude_modules"
            )
        return spectral_experts(
            left,
            values,
            right,
            num_experts=config.num_experts,
            num_generalized=config.num_generalized,
            rho=config.rho,
            eta=config.eta,
            base_scale=config.base_scale,
            backbone_adjustment=config.backbone_adjustment,  # type: ignore[arg-type]
        )

    def _set_experts(self, adapter_name: str, experts: SpectralExperts) -> None:
        self.gse_A[adapter_name].copy_(experts.down)
        self.gse_B[adapter_name].copy_(experts.up)
        self.gse_scaling[adapter_name].copy_(experts.scales)
        if experts.backbone_down is not None and experts.backbone_up is not None:
            self.gse_backbone_A[adapter_name].copy_(experts.backbone_down)
            self.gse_backbone_B[adapter_name].copy_(experts.backbone_up)

    def check_mergeable(self) -> None:
        """
        Raises:
            ValueError: If the base layer is quantised.
        """
        if self.is_quantized:
            raise ValueError(f"{self.name} is quantised: merging would round the adapter away; keep it unmerged")

    def cast_adapter(self, adapter_name: str, dtype: torch.dtype) -> None:
        """Casts what trains of an adapter. Scales and adjustment of the backbone stay as they are."""
        for name in self.adapter_layer_names:
            factors = getattr(self, name)
            if adapter_name in factors:
                self._replace(factors, adapter_name, factors[adapter_name].detach().to(dtype))

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own casts to the base layer's dtype as well.
        target = device or self.weight.device
        for name in (*self.adapter_layer_names, *self.other_param_names):
            factors = getattr(self, name)
            present = isinstance(factors, nn.ParameterDict) and adapter_name in factors
            if present and not factors[adapter_name].is_meta:
                self._replace(factors, adapter_name, factors[adapter_name].detach().to(target))

    def _replace(self, factors: nn.ParameterDict, adapter_name: str, values: Tensor) -> None:
        old = factors[adapter_name]
        # What is assigned as a plain tensor would train, the frozen parts too.
        factors[adapter_name] = new = nn.Parameter(values, requires_grad=old.requires_grad)
        if self._awaiting.get(adapter_name) is old:
            self._awaiting[adapter_name] = new

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._awaiting.pop(adapter_name, None)

    def _check_loaded(self, adapter_name: str) -> None:
        if self._awaiting and self._awaiting.get(adapter_name) is self.gse_A[adapter_name]:
            raise RuntimeError(
                f"adapter {adapter_name!r} was made from the configuration of a saved adapter, whose weights have not "
                "been loaded; load them with PeftModel.from_pretrained or load_adapter, or, to start anew, set "
                "base_weights_sha256=None in a new GSEConfig"
            )


class Linear(nn.Module, GSELayer):
    """
    A linear layer, or transformers' `Conv1D`, with experts.

    Args:
        base_layer (`torch.nn.Module`): The layer.
        adapter_name (`str`): The adapter to add.
        config ([`GSEConfig`]): Its configuration.
        name (`str`): The layer's name in the model; for errors and for the routing log.
        routing ([`RoutingLog`]): Where training notes what the routers do.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: GSEConfig, name: str, routing: RoutingLog
    ) -> None:
        super().__init__()
        GSELayer.__init__(self, base_layer, name, routing)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output, and what the active adapters add to it, in the output's dtype."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return result
        dtype = result.dtype
        for adapter_name in self.active_adapters:
            if adapter_name in self.gse_A:
                result = result + self._adapter_output(adapter_name, x)
        return result.to(dtype)

    def _adapter_output(self, adapter_name: str, x: Tensor) -> Tensor:
        """
        Experts, backbone adjustment and router read the input in one product, and experts and adjustment write the
        output in another. What tokens are not routed to is masked in between, on the rank axis.
        """
        self._check_loaded(adapter_name)
        config = self.gse_config[adapter_name]
        down, up = [self.gse_A[adapter_name]], [self.gse_B[adapter_name]]
        dtype = down[0].dtype
        if adapter_name in self.gse_backbone_A:
            down.append(self.gse_backbone_A[adapter_name].to(dtype))
            up.append(self.gse_backbone_B[adapter_name].to(dtype))
        width = config.r * len(down)
        if config.num_specialized:
            down.append(self.gse_router[adapter_name])
        projected = functional.linear(self._cast_input_dtype(x, dtype), torch.cat(down))
        gate = spread_over_ranks(self._gate(adapter_name, projected[..., width:]), config.r)
        # The adjustment is taken off, whatever the routing.
        gate = functional.pad(gate, (0, width - config.r), value=-1.0)
        return functional.linear((projected[..., :width] * gate).to(dtype), torch.cat(up, dim=1))

    def _gate(self, adapter_name: str, logits: Tensor) -> Tensor:
        """Scale times weight of each expert: `(..., E)`, or `(E,)` where nothing is routed."""
        config, scaling = self.gse_config[adapter_name], self.gse_scaling[adapter_name]
        always = scaling[: config.num_generalized] / max(config.num_generalized, 1)
        if not config.num_specialized:
            return always
        weights, probabilities, selected = top_k_gate(logits, config.top_k)
        if self.training:
            self._routing.note(self.name, adapter_name, probabilities, selected)
        routed = weights * scaling[config.num_generalized :]
        return torch.cat((always.expand(*routed.shape[:-1], -1), routed), dim=-1)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Adds the active adapters to the base layer's weight.

        Args:
            safe_merge (`bool`, *optional*, defaults to `False`): Checks the new weight for values that are not finite
                before it replaces the old one.
            adapter_names (`list[str]`, *optional*): Which; by default those that are active.

        Raises:
            ValueError: If an adapter routes, the base layer is quantised, or `safe_merge` finds such values.
        """
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if adapter_name not in self.gse_A:
                continue
            self.check_mergeable()
            delta = self.get_delta_weight(adapter_name)
            weight: Any = self.get_base_layer().weight
            merged = weight.data + delta.to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"{self.name}: merging adapter {adapter_name!r} gives values that are not finite")
            weight.data = merged
            self.merged_adapters.append(adapter_name)

    def unmerge(self) -> None:
        """Takes merged adapters off the base layer's weight again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            weight: Any = self.get_base_layer().weight
            adapter_name = self.merged_adapters.pop()
            if adapter_name in self.gse_A:
                weight.data -= self.get_delta_weight(adapter_name).to(weight.dtype)

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """
        What an adapter without routing adds to the base layer's weight, in its layout; computed in float32 or better.

        Raises:
            ValueError: If the adapter routes.
        """
        self._check_loaded(adapter_name)
        config = self.gse_config[adapter_name]
        if config.num_specialized:
            raise ValueError(cannot_merge(adapter_name))
        dtype = self.gse_scaling[adapter_name].dtype
        gate = spread_over_ranks(self.gse_scaling[adapter_name] / config.num_generalized, config.r)
        delta = (self.gse_B[adapter_name].to(dtype) * gate) @ self.gse_A[adapter_name].to(dtype)
        if adapter_name in self.gse_backbone_A:
            delta -= self.gse_backbone_B[adapter_name] @ self.gse_backbone_A[adapter_name]
        return delta.mT if isinstance(self.get_base_layer(), Conv1D) else delta

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for name in [name for name in self._awaiting if f"{prefix}gse_A.{name}" in state_dict]:
            del self._awaiting[name]

    def __repr__(self) -> str:
        return "gse." + super().__repr__()


def cannot_merge(adapter_name: str) -> str:
    """Why an adapter that routes cannot be merged, and what to do."""
    return (
        f"adapter {adapter_name!r} routes each token to other experts, so no single weight does what it does: keep "
        "the adapter and save it with save_pretrained, take it off with unload(), or train one without specialized "
        "experts (num_generalized=num_experts), which can be merged"
    )


def _frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def _init_like_linear(weight: Tensor) -> None:
    nn.init.kaiming_uniform_(weight, a=5**0.5)
