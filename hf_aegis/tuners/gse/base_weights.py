"""Which weights an adapter was made for: its spectrum, and what it takes off the backbone, are those of no others."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight
from torch import Tensor, nn

from hf_aegis.anchors.weight_hash import hash_tensors
from hf_aegis.tuners.gse.config import GSEConfig


# Below this many elements hashing takes less than a second, and a progress bar would only flicker.
_PROGRESS_FROM_ELEMENTS = 2**27


# In the place of a hash. The adapter of such a model is one that was saved all the same.
UNKNOWN = "unknown"


def hash_base_weights(layers: Mapping[str, nn.Module]) -> str:
    """
    SHA-256 over names, shapes and float32 values of linear layers' weights; of quantised ones as they are decoded. It
    is the same for a bfloat16 checkpoint loaded in float32, but not for one that was quantised since.

    Args:
        layers (`Mapping[str, torch.nn.Module]`): The layers, by name.

    Returns:
        `str`: hexadecimal digest; `"unknown"` where weights are on the `meta` device and hold no data.
    """
    weights: list[Any] = [layer.weight for layer in layers.values()]
    if any(weight.is_meta for weight in weights):
        return UNKNOWN
    return hash_tensors(
        {f"{name}.weight": partial(decoded_weight, layers[name]) for name in sorted(layers)},
        description="Hashing base weights",
        progress=sum(weight.numel() for weight in weights) >= _PROGRESS_FROM_ELEMENTS,
    )


def check_base_weights(layers: Mapping[str, nn.Module], config: GSEConfig) -> None:
    """
    Checks that an adapter belongs to a model.

    Args:
        layers (`Mapping[str, torch.nn.Module]`): The layers that it is to be put on, by name.
        config ([`GSEConfig`]): The saved configuration, with the hash of the layers it was made for.

    Raises:
        ValueError: If these are others.
    """
    found = hash_base_weights(layers)
    if UNKNOWN not in (found, config.base_weights_sha256) and found != config.base_weights_sha256:
        raise ValueError(
            f"this adapter was made for a base model whose {len(layers)} targeted layers hash to "
            f"{config.base_weights_sha256}, but those of this model hash to {found}: the weights have changed since, "
            "were quantised or rounded, or other layers have the same names. Load the base model that the adapter was "
            "trained on (base_model_name_or_path of its configuration: "
            f"{config.base_model_name_or_path!r}), or, knowing that the weights differ, pass "
            "PeftModel.from_pretrained a GSEConfig with check_base_weights=False"
        )


def decoded_weight(layer: nn.Module) -> Tensor:
    """A linear layer's weight as it is stored, decoded where it is quantised, and without gradient."""
    weight: Any = layer.weight
    if type(weight).__name__ in ("Params4bit", "Int8Params"):
        # Not by dequantize_module_weight: it replaces an 8-bit layer's weight, which breaks one that ran before.
        return dequantize_bnb_weight(weight, state=getattr(layer, "state", None)).detach()
    return dequantize_module_weight(layer).detach()
