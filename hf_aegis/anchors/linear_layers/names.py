"""The linear layers of a model, by the names that they have in an anchor."""

from collections.abc import Collection, Iterator, Sequence

from torch import nn

from hf_aegis.anchors.decoder_layers import unwrap_model


LAYERS_PREFIX = "layers."

# What `torch.compile` and activation checkpointing call the module inside, and what PEFT does.
_AROUND = ("_orig_mod", "_checkpoint_wrapped_module")
_PEFT = ("base_layer", "original_module")


def named_linears(model: nn.Module, layers: nn.ModuleList, *, copies: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """
    Every linear layer of a model, those of the decoder layers first.

    Args:
        model (`nn.Module`):
            The model, wrapped or not.
        layers (`nn.ModuleList`):
            Its decoder layers.
        copies (`bool`, *optional*, defaults to `False`):
            A module that PEFT copied for training (`modules_to_save`) counts as its copies, so that a name can occur
            more than once, rather than as the original; first the copy that runs.

    Yields:
        `tuple[str, nn.Module]`: the name and what the model calls there: the layer, or what is wrapped around it. It
        is `layers.<index>.<path in the layer>` inside the decoder layers, and the path in the unwrapped model
        elsewhere; either without what PEFT, `torch.compile` or activation checkpointing put in between.
    """
    for path, module in (*_inside(layers, copies), *_walk(unwrap_model(model), "", set(layers), copies)):
        if _is_linear(module):
            yield path, module


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
        `dict[str, nn.Module]`: by their names, see [`named_linears`]. A layer that PEFT wraps is represented by the
        wrapper, whose input is the layer's.

    Raises:
        ValueError: if there is no linear layer inside, or no module or linear layer outside for one of `modules`.
    """
    inside = {path: module for path, module in _inside(layers) if _is_linear(module)}
    if not inside:
        raise ValueError(f"no linear layers (nn.Linear) inside the {len(layers)} decoder layers: nothing to hold")
    return {**inside, **_find_outside(unwrap_model(model), layers, modules)}


def base_module(module: nn.Module) -> nn.Module:
    """
    The module inside of what PEFT (`base_layer` of a tuner layer, `original_module` of a copy for training),
    `torch.compile` or activation checkpointing put around it.
    """
    return _inner(module, (*_PEFT, *_AROUND))


def called_module(module: nn.Module) -> nn.Module:
    """The module, or PEFT's wrapper of it, inside of what `torch.compile` or checkpointing put around it."""
    return _inner(module, _AROUND)


def _find_outside(base: nn.Module, layers: nn.ModuleList, names: Sequence[str]) -> dict[str, nn.Module]:
    paths = dict(_walk(base, "", set(layers)))
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


def _inner(module: nn.Module, attributes: Sequence[str]) -> nn.Module:
    for attribute in attributes:
        inner = getattr(module, attribute, None)
        if isinstance(inner, nn.Module):
            return _inner(inner, attributes)
    return module


def _inside(layers: nn.ModuleList, copies: bool = False) -> Iterator[tuple[str, nn.Module]]:
    for index, layer in enumerate(layers):
        yield from _walk(layer, f"{LAYERS_PREFIX}{index}", copies=copies)


def _walk(
    module: nn.Module, path: str, without: Collection[nn.Module] = (), copies: bool = False
) -> Iterator[tuple[str, nn.Module]]:
    """A module and those inside, but for `without` and what is in there, under names without wrappers."""
    trained = getattr(module, "modules_to_save", None)
    if copies and isinstance(trained, nn.ModuleDict):
        active = getattr(module, "active_adapters", ())
        for name in sorted(trained, key=lambda name: name not in active):
            yield from _walk(trained[name], path, without, copies)
        return
    yield path, module
    for name, child in base_module(module).named_children():
        if child not in without:
            yield from _walk(child, f"{path}.{name}" if path else name, without, copies)
