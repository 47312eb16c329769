"""Which modules of a model do not train."""

from torch import nn


DEFAULT_FROZEN = "vision_tower"


def freeze_modules(model: nn.Module, names: list[str] | None) -> None:
    """
    Freezes modules.

    Args:
        model (`torch.nn.Module`): Is changed in place.
        names (`list[str]`, *optional*): Ends of their paths; by default the vision tower, where there is one.

    Raises:
        ValueError: If a name fits no module.
    """
    modules = []
    for name in [DEFAULT_FROZEN] if names is None else names:
        found = [module for path, module in model.named_modules() if f".{path}".endswith(f".{name}")]
        if not found and names is not None:
            raise ValueError(f"frozen_modules: {type(model).__name__} has no module whose path ends with {name!r}")
        modules += found
    for module in modules:
        module.requires_grad_(False)
