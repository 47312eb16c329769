"""How PEFT gets to know the tuners of this package, without its being imported for that."""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.tuners_utils import BaseTuner

_TUNERS = ("hf_aegis.tuners.gse",)


def register_tuner(config_class: "type[PeftConfig]", model_class: "type[BaseTuner]") -> None:
    """
    Enters a tuner into PEFT's mappings. PEFT's own `register_peft_method` takes members of its enumeration alone.

    Args:
        config_class (`type`): The configuration; it has a default for every field.
        model_class (`type`): The model, with its `prefix`.

    Raises:
        ValueError: If PEFT knows another method by that name or prefix.
    """
    from peft.mapping import (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    )

    # The mappings are typed by the enumeration; its members are strings, and so is this.
    name: Any = config_class().peft_type
    known = PEFT_TYPE_TO_TUNER_MAPPING.get(name)
    prefixes = {key: prefix for key, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items() if key != name}
    if known not in (None, model_class) or model_class.prefix in prefixes.values():
        raise ValueError(f"PEFT has a method with the name {name!r} or the prefix {model_class.prefix!r} already")
    PEFT_TYPE_TO_CONFIG_MAPPING[name] = config_class
    PEFT_TYPE_TO_TUNER_MAPPING[name] = model_class
    PEFT_TYPE_TO_PREFIX_MAPPING[name] = model_class.prefix


def register_with_peft() -> None:
    """Registers this package's tuners: now, if PEFT is imported already, or else as soon as it is."""
    if "peft" in sys.modules:
        _register()
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())


def _register() -> None:
    for tuner in _TUNERS:
        importlib.import_module(tuner)


class _PeftFinder(MetaPathFinder):
    """Lets the other finders find PEFT, and has it import the tuners when it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            self._add_registration(spec.loader)
        return spec

    def _add_registration(self, loader: object) -> None:
        execute = loader.exec_module  # type: ignore[attr-defined]

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _register()

        # On this loader alone, which was made for this import; its type stays what tools expect.
        loader.exec_module = execute_and_register  # type: ignore[attr-defined]
