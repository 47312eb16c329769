"""A reader of files, as the fuzzer takes it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzz_engine import Mutation, Report, fuzz, replay


@dataclass(frozen=True)
class FileReader:
    """
    Args:
        seeds (`list[bytes]`): Sound files.
        read (`Callable`): Reads one.
        naming (`str`): What each error has to name.
        structured (`tuple[Mutation, ...]`): Mutations of what such a file holds.
    """

    seeds: list[bytes]
    read: Callable[[bytes], Any]
    naming: str
    structured: tuple[Mutation, ...]
    allowed: tuple[type[BaseException], ...] = (ValueError, OSError)

    def fuzz(self, number: int, seed: int = 0) -> Report:
        """Reads so many damaged files."""
        return fuzz(self.seeds, self.read, self.allowed, number, seed, structured=self.structured, naming=self.naming)

    def replay(self, folder: Path) -> Report:
        """Reads the files that were read wrongly once."""
        return replay(folder, self.read, self.allowed, naming=self.naming)
