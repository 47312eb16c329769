"""Which of a model's parameters make up its action expert."""

from collections.abc import Iterable

from torch import nn
from torch.nn import Parameter


def without_wrappers(name: str) -> str:
    """A module's or parameter's name without what FSDP's own activation checkpointing puts in between."""
    return name.replace("._checkpoint_wrapped_module", "")


def expert_modules(model: nn.Module, paths: Iterable[str] | None = None) -> list[str]:
    """
    Dotted paths of the modules that make up the action expert of `model`.

    Args:
        model (`torch.nn.Module`): The model.
        paths (`Iterable[str]`, *optional*): Given paths, which are only checked. By default every module called
            `action_expert`, and on a model with a `vlm` (transformers' π0) all modules beside it.

    Returns:
        `list[str]`: May be empty: a plain language model has no expert.

    Raises:
        ValueError: If the model has no module of a given path.
    """
    names = {without_wrappers(name) for name, _ in model.named_modules()}
    if paths is not None:
        paths = list(paths)
        if missing := [path for path in paths if path not in names]:
            raise ValueError(f"expert_modules: {type(model).__name__} has no module {missing[0]!r}")
        return paths
    found = [name for name in names if name.split(".")[-1] == "action_expert"]
    if found:
        return sorted(found)
    vlm = next((name for name in names if name.split(".")[-1] == "vlm"), None)
    if vlm is None:
        return []
    parents = {".".join(vlm.split(".")[:depth]) for depth in range(vlm.count(".") + 1)}
    return sorted(n for n in names if n != vlm and n not in parents and n.rpartition(".")[0] in parents)


def expert_parameters(model: nn.Module, paths: Iterable[str] | None = None) -> dict[str, Parameter]:
    """Trainable parameters of the action expert by name, without wrappers; see [`expert_modules`]."""
    prefixes = tuple(f"{path}." for path in expert_modules(model, paths))
    named = ((without_wrappers(name), p) for name, p in model.named_parameters())
    return {name: p for name, p in named if p.requires_grad and name.startswith(prefixes)}
