"""The linear layers whose inputs an anchor describes, by the names they have in it."""

from collections.abc import Iterator, Sequence

from torch import nn

from hf_aegis.anchors.decoder_layers import unwrap_model


LAYERS_PREFIX = "layers."

# What a wrapper calls the module inside.
_INNER = ("base_layer", "original_module", "_orig_mod", "_checkpoint_wrapped_module")


def find_linears(model: nn.Module, layers: nn.ModuleList, modules: Sequence[str] = ()) -> dict[str, nn.Module]:
    """
    Finds the linear layers of the decoder layers, and others that are asked for.

    Args:
        model (`nn.Module`):
            The model, wrapped or not.
        layers (`nn.ModuleList`):
            Its decoder layers.
        modules (`Sequence[str]`, *optional*):
            Linear layers outside of these, or modules whose linear layers count: the end of their path, such as
            `"multi_modal_projector"`.

    Returns:
        `dict[str, nn.Module]`: those inside as `layers.<index>.<path in the layer>`, those outside by their path in
        the unwrapped model; names are without PEFT. A layer that PEFT wraps is represented by the wrapper, whose
        input is the layer's.

    Raises:
        ValueError: if there is no linear layer inside, or no module or linear layer outside for one of `modules`.
    """
    inside = {
        f"{LAYERS_PREFIX}{index}.{path}": module
        for index, layer in enumerate(layers)
        for path, module in _walk(layer)
        if _is_linear(module)
    }
    if not inside:
        raise ValueError(f"no linear layers (nn.Linear) inside the {len(layers)} decoder layers: nothing to hold")
    return {**inside, **_find_outside(unwrap_model(model), layers, modules)}


def base_module(module: nn.Module) -> nn.Module:
    """
    The module inside of what PEFT (`base_layer` of a tuner layer, `original_module` of a copy for training),
    `torch.compile` or activation checkpointing put around it.
    """
    for attribute in _INNER:
        inner = getattr(module, attribute, None)
        if isinstance(inner, nn.Module):
            return base_module(inner)
    return module


def _find_outside(base: nn.Module, layers: nn.ModuleList, names: Sequence[str]) -> dict[str, nn.Module]:
    paths = dict(_walk(base, without=layers))
    outside: dict[str, nn.Module] = {}
    for name in names:
        tops = [path for path in paths if f".{path}".endswith(f".{name}")]
        if not tops:
            raise ValueError(
                f"modules: {type(base).__name__} has no module outside of its decoder layers whose path ends with "
                f"{name!r}"
            )
        found = {
            path: module
            for path, module in paths.items()
            if _is_linear(module) and any(f"{path}.".startswith(f"{top}.") for top in tops)
        }
        if not found:
            raise ValueError(f"modules: {name!r} of {type(base).__name__} holds no linear layers (nn.Linear)")
        outside.update(found)
    return outside


def _is_linear(module: nn.Module) -> bool:
    return isinstance(base_module(module), nn.Linear)


def _walk(module: nn.Module, path: str = "", without: nn.Module | None = None) -> Iterator[tuple[str, nn.Module]]:
    yield path, module
    for name, child in base_module(module).named_children():
        if child is not without:
            yield from _walk(child, f"{path}.{name}" if path else name, without)
