"""Tuning methods for PEFT. Importing `hf_aegis` makes them known to PEFT, whichever of the two comes first."""

from typing import Any

from hf_aegis.lazy_exports import resolve


_EXPORTS = {
    "GSEConfig": "hf_aegis.tuners.gse",
    "GSEModel": "hf_aegis.tuners.gse",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    return resolve(__name__, _EXPORTS, name)


def __dir__() -> list[str]:
    return sorted(__all__)
