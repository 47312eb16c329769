"""What a reader is fuzzed with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fuzz_engine import Mutation


@dataclass(frozen=True)
class Case:
    """Arguments of [`~fuzz_engine.fuzz`]."""

    reader: Callable[[bytes], Any]
    seeds: list[bytes]
    allowed: tuple[type[BaseException], ...]
    structured: tuple[Mutation, ...] = ()
