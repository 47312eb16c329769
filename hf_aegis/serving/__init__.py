"""A policy server that speaks openpi's client protocol. Names are imported when first used."""

from typing import Any

from hf_aegis.lazy_exports import resolve


_EXPORTS = {
    "CLIENTS": "hf_aegis.serving.clients",
    "MessageError": "hf_aegis.serving.messages",
    "ObservationReader": "hf_aegis.serving.clients",
    "PolicyServer": "hf_aegis.serving.server",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    return resolve(__name__, _EXPORTS, name)


def __dir__() -> list[str]:
    return sorted(__all__)
