"""A model whose linear layers have generalized and specialized experts."""

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from hf_aegis.tuners.gse.base_weights import check_base_weights, hash_base_weights
from hf_aegis.tuners.gse.config import GSEConfig
from hf_aegis.tuners.gse.layer import GSELayer, Linear, cannot_merge
from hf_aegis.tuners.gse.routing_log import RoutingLog, RoutingRecord


# Below this many elements the decompositions take seconds, and a progress bar would only flicker.
_PROGRESS_FROM_ELEMENTS = 2**24


class GSEModel(BaseTuner):
    """
    Puts generalized and specialized experts on the linear layers of a model (VLA-GSE, arXiv 2605.06175).

    ```python
    >>> from peft import get_peft_model
    >>> from hf_aegis import GSEConfig

    >>> model = get_peft_model(base_model, GSEConfig(target_modules="all-linear"))
    >>> loss = model(**batch).loss + model.get_auxiliary_loss()
    ```

    Args:
        model ([`~transformers.PreTrainedModel`] or `torch.nn.Module`): The model to be adapted. Its weights are not
            changed, unless an adapter without routing is merged.
        config ([`GSEConfig`]): The configuration.
        adapter_name (`str`, *optional*, defaults to `"default"`): The adapter's name.
        low_cpu_mem_usage (`bool`, *optional*, defaults to `False`): Makes an adapter without weights, to be loaded.

    Raises:
        ValueError: If a target is no linear layer or too small, or a saved adapter was made for other weights.

    **Attributes**:
        - **model** -- The model to be adapted.
        - **peft_config** (`dict[str, GSEConfig]`) -- The configurations, by adapter.
    """

    prefix: str = "gse_"
    tuner_layer_cls = GSELayer
    peft_config: dict[str, GSEConfig]  # type: ignore[assignment]
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    def get_auxiliary_loss(self) -> Tensor:
        r"""
        What is to be added to the loss of the last forward pass, so that the router does not send all tokens to the
        same experts: \\(\lambda \sum_l n_s \sum_j f_{lj} P_{lj}\\), with the share of tokens \\(f\\) that each expert
        of a layer gets, its mean probability \\(P\\), and \\(\lambda\\) the `router_aux_loss_coef` of the adapter.

        Padding does not count where the model was called with an `attention_mask` of shape `(batch, tokens)` as a
        keyword; layers that see something other than these tokens, such as an image's patches, count all they see. A
        layer that runs more than once in a forward pass counts with its last run. Under autocast the router's logits
        are computed in its dtype, and their softmax in float32.

        Returns:
            `Tensor`: A scalar in float32 or better; zero outside of training, where nothing is recorded, and without
            specialized experts.

        Raises:
            RuntimeError: If the forward pass had no gradients and thus its balance cannot be trained, as under
                reentrant gradient checkpointing.
        """
        losses = []
        for (layer, adapter_name), record in self._routing.records.items():
            config = self.peft_config.get(adapter_name)
            if config is None or not config.router_aux_loss_coef:
                continue
            loss = record.balance_loss()
            if torch.is_grad_enabled() and not loss.requires_grad and self._router_trains(layer, adapter_name):
                raise RuntimeError(
                    f"the forward pass of {layer} ran without gradients, so the load-balancing loss cannot train its "
                    "router; under gradient checkpointing, choose "
                    'gradient_checkpointing_kwargs={"use_reentrant": False}'
                )
            losses.append(config.router_aux_loss_coef * loss)
        if not losses:
            return torch.zeros((), device=next(self.model.parameters()).device)
        return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()

    def routing_records(self) -> dict[tuple[str, str], RoutingRecord]:
        """What each layer's router did in the last forward pass in training, by names of layer and adapter."""
        return dict(self._routing.records)

    def _router_trains(self, layer: str, adapter_name: str) -> bool:
        router = self.model.get_submodule(layer).gse_router
        return adapter_name in router and router[adapter_name].requires_grad

    def _pre_injection_hook(self, model: nn.Module, config: GSEConfig, adapter_name: str) -> None:  # type: ignore[override]
        # Adapters that were injected earlier, without a PeftModel, have a log already.
        known = next((module._routing for module in model.modules() if isinstance(module, GSELayer)), None)
        if known is None:
            known = RoutingLog()
            known.follow(model)
        self._routing = known

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """
        Adds an adapter to the model's layers, as PEFT's tuners do.

        Raises:
            ValueError: If the adapter was saved for a model with other weights.
        """
        config = self.peft_config[adapter_name]
        if config.awaits_weights and config.check_base_weights:
            # Before the model is changed.
            check_base_weights(self._targets(model, config), config)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if not config.awaits_weights:
            layers = {
                name: module
                for name, module in model.named_modules()
                if isinstance(module, GSELayer) and adapter_name in module.gse_A
            }
            _initialise(layers.values(), adapter_name)
            config.base_weights_sha256 = hash_base_weights(
                {name: module.get_base_layer() for name, module in layers.items()}
            )

    def _targets(self, model: nn.Module, config: GSEConfig) -> dict[str, nn.Module]:
        """The base layers that a configuration without `"all-linear"` would adapt, by name."""
        targets: dict[str, nn.Module] = {}
        inside: tuple[str, ...] = ()
        for name, module in model.named_modules():
            if name.startswith(inside) and inside:
                continue
            if name and self._check_target_module_exists(config, name):
                targets[name] = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            if isinstance(module, BaseTunerLayer):
                inside = (*inside, f"{name}.")
        return targets

    def _create_and_replace(  # type: ignore[override]
        self,
        config: GSEConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if isinstance(target, GSELayer):
            target.update_layer(adapter_name, config)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        # The quantised layers of bitsandbytes are linear layers too; those of other libraries cannot be decomposed.
        weight = getattr(base, "weight", None)
        in_bytes = isinstance(weight, Tensor) and weight.is_floating_point() and weight.element_size() < 2
        if not isinstance(base, nn.Linear | Conv1D) or in_bytes:
            found = f"{type(base).__name__} in {getattr(weight, 'dtype', None)}"
            raise ValueError(
                f"{current_key} is a {found}; only torch.nn.Linear, transformers' Conv1D and bitsandbytes' quantised "
                "linear layers can have experts. Leave it out with exclude_modules"
            )
        new_module = Linear(target, adapter_name, config, current_key, self._routing)
        if adapter_name not in self.active_adapters:
            # An additional adapter is not trained until it is active.
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # Experts are made on the base layer's device. PEFT's own would copy the weight of what is put back when the
        # model is unloaded, which modules that were trained in full need not have.
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            # The other tuners' adapters are made in the base layer's dtype, and then cast; these the other way round.
            for module in self.model.modules():
                if isinstance(module, GSELayer) and not module.is_quantized:
                    module.cast_adapter(adapter_name, module.weight.dtype)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """
        Adds adapters to the base model's weights, as PEFT's tuners do.

        Raises:
            ValueError: If one of them routes, or a layer is quantised; nothing has been merged then.
        """
        self._check_mergeable(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = True,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_mergeable(adapter_names)
        model: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        self._routing.unfollow()
        return model

    def _check_mergeable(self, adapter_names: list[str] | None) -> None:
        for adapter_name in self.active_adapters if adapter_names is None else adapter_names:
            if adapter_name in self.peft_config and self.peft_config[adapter_name].num_specialized:
                raise ValueError(cannot_merge(adapter_name))
        for module in self.model.modules():
            if isinstance(module, GSELayer):
                module.check_mergeable()

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names, one adapter for each sample of a batch, is not supported by GSE; choose one for the "
                "whole batch with set_adapter()"
            )
        yield

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """
        Not supported.

        Raises:
            NotImplementedError: Always: experts and routers of different adapters cannot be averaged.
        """
        raise NotImplementedError(
            "adapters with experts cannot be combined into one: an average of routers routes as none of them; "
            "activate several with base_model.set_adapter([...]), which adds up what they do"
        )


def _initialise(layers: Collection[GSELayer], adapter_name: str) -> None:
    present = [layer for layer in layers if not layer.gse_A[adapter_name].is_meta]
    quick = sum(layer.in_features * layer.out_features for layer in present) < _PROGRESS_FROM_ELEMENTS
    for layer in tqdm(present, desc="Making experts", unit="layer", disable=True if quick else None):
        layer.reset_gse_parameters(adapter_name)
