"""Names of a package that are imported when they are first used, so that importing the package stays cheap."""

import importlib
from collections.abc import Mapping
from typing import Any


def resolve(package: str, exports: Mapping[str, str], name: str) -> Any:
    """
    What a package's `__getattr__` returns.

    Args:
        package (`str`): The package's `__name__`.
        exports (`Mapping[str, str]`): Public names, and the modules where they live.
        name (`str`): The name that is asked for.

    Raises:
        AttributeError: If the package does not export `name`.
    """
    if name not in exports:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(importlib.import_module(exports[name]), name)
