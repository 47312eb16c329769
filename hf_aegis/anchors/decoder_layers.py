"""Where the decoder layers of a language model, or of the language model inside a larger one, are."""

from typing import Any

from torch import nn


# What data-parallel engines and `torch.compile` call the model they wrap.
_WRAPPERS = ("module", "_orig_mod")


def unwrap_model(model: nn.Module) -> nn.Module:
    """
    The Hugging Face model inside data-parallel engines (`.module`), `torch.compile` (`._orig_mod`) and PEFT
    (`.get_base_model()`), nested in any order. Adapters that PEFT injected into the layers stay where they are.
    """
    while True:
        inner = _wrapped(model)
        if inner is None:
            return model
        model = inner


def find_decoder_layers(model: nn.Module, layers: str | nn.ModuleList | None = None) -> nn.ModuleList:
    """
    Finds the stack of decoder layers of a model's language model.

    The rule, after [`unwrap_model`]: a submodule called `vlm` goes first (π0 keeps its vision-language model there,
    beside an action expert that is a decoder as well), then what `get_decoder()` returns, then the model itself; the
    first of them that has a non-empty `layers` list wins. This covers plain causal language models and their base
    models, vision-language models such as PaliGemma, and π0.

    Args:
        model (`nn.Module`):
            A Hugging Face model, possibly wrapped by PEFT, `accelerate` or `torch.compile`.
        layers (`str` or `nn.ModuleList`, *optional*):
            The layers themselves, or their dotted path from the unwrapped model (`"transformer.h"`), for a model that
            keeps them elsewhere.

    Returns:
        `nn.ModuleList`: the layers, first to last.

    Raises:
        ValueError: if there are no layers where the rule, or `layers`, says.
    """
    base = unwrap_model(model)
    name = type(base).__name__
    if isinstance(layers, nn.ModuleList):
        return _not_empty(layers, f"the layers given for {name}")
    if isinstance(layers, str):
        try:
            named = base.get_submodule(layers)
        except AttributeError as error:
            raise ValueError(f"{name} has no submodule at layers={layers!r}: {error}") from error
        if not isinstance(named, nn.ModuleList):
            raise ValueError(f"{name}: layers={layers!r} is a {type(named).__name__}, expected an nn.ModuleList")
        return _not_empty(named, f"{name}: layers={layers!r}")
    found, looked_at = _search(base, name)
    if found is None:
        raise ValueError(
            f"no decoder layers found in {name}: looked for a non-empty nn.ModuleList called `layers` in "
            f"{', '.join(looked_at)}. Pass layers='path.to.the.layers' or the nn.ModuleList itself."
        )
    return found


def _search(base: nn.Module, name: str) -> tuple[nn.ModuleList | None, list[str]]:
    looked_at: list[str] = []
    for path, owner in (("", base), (".base_model", getattr(base, "base_model", None))):
        vlm = getattr(owner, "vlm", None)
        looked_at.append(f"{name}{path}.vlm")
        if isinstance(vlm, nn.Module):
            # A model that keeps a VLM apart from the rest has no other decoder worth anchoring, so no search goes on.
            found, inner = _search(vlm, f"{name}{path}.vlm")
            return found, looked_at + inner
    candidates: list[tuple[str, Any]] = []
    if callable(getattr(base, "get_decoder", None)):
        candidates.append((f"{name}.get_decoder()", base.get_decoder()))  # type: ignore[operator]
    candidates.append((name, base))
    for label, candidate in candidates:
        looked_at.append(label)
        layers = getattr(candidate, "layers", None)
        if isinstance(layers, nn.ModuleList) and len(layers) > 0:
            return layers, looked_at
    return None, looked_at


def _wrapped(model: nn.Module) -> nn.Module | None:
    if callable(getattr(model, "get_base_model", None)):
        inner = model.get_base_model()  # type: ignore[operator]
        return inner if inner is not model else None
    for attribute in _WRAPPERS:
        inner = getattr(model, attribute, None)
        if isinstance(inner, nn.Module):
            return inner
    return None


def _not_empty(layers: nn.ModuleList, label: str) -> nn.ModuleList:
    if len(layers) == 0:
        raise ValueError(f"{label}: the list of layers is empty")
    return layers
