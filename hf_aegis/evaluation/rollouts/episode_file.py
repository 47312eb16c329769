"""A file of finished episodes that a killed evaluation continues: JSON lines, the settings first."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from hf_aegis.evaluation.rollouts.episodes import EpisodeResult
from hf_aegis.format_version import check_format_version, written_version
from hf_aegis.json_files import parse_json_object


_KIND = "episodes"
_ANEW = "Delete the file, or choose another output, to start anew."


class EpisodeFile:
    """
    Finished episodes, each a line, written through to the disk before the next is begun. One process at a time holds
    the file. Where an episode stands in it twice, as a crashed one that was tried again, the later line counts.

    Args:
        path (`Path`): The file; made if it does not exist.
        settings (`Mapping[str, Any]`): What the results depend on, as JSON values.

    Attributes:
        results (`dict`): By [`EpisodeResult.key`], the episodes finished so far.

    Raises:
        ValueError: If the file was written with other settings, each named with both values, is not such a file, has
            a newer format, or is held by another process.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        self.path = path
        self.results: dict[tuple[str, str, int], EpisodeResult] = {}
        self._settings = json.loads(json.dumps(settings))
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        self._file = self.path.open("ab+")
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def append(self, result: EpisodeResult, **more: Any) -> None:
        """Writes an episode, with what else its line says, through to the disk."""
        self._write(result.to_dict() | more)
        self.results[result.key] = result

    def _read(self) -> None:
        assert self._file is not None
        self._file.seek(0)
        content = self._file.read()
        # A line without its end was being written when the evaluation was killed.
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self._file.truncate(whole)
        lines = content[:whole].split(b"\n")[:-1]
        if not lines:
            self._write({**written_version(_KIND), "settings": self._settings})
            return
        first = parse_json_object(lines[0], f"{self.path}, line 1")
        check_format_version(first, _KIND, f"{self.path}, line 1")
        self._check(first.get("settings"))
        for number, line in enumerate(lines[1:], start=2):
            values = parse_json_object(line, f"{self.path}, line {number}")
            try:
                result = EpisodeResult.from_dict(values)
            except ValueError as error:
                raise ValueError(f"{self.path}, line {number}: not an episode: {error}") from error
            self.results[result.key] = result

    def _write(self, values: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(values, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _lock(self) -> None:
        # POSIX only: imported here, so that the rest of the package does not depend on it.
        import fcntl

        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{self.path}: another process is evaluating into it; wait for it to end") from error

    def _check(self, found: Any) -> None:
        if not isinstance(found, dict):
            raise ValueError(f"{self.path}, line 1: expected the key 'settings' with an object; found {found!r}.")
        differing = [
            f"{key} is {found.get(key)!r} there and {self._settings.get(key)!r} here"
            for key in sorted(found.keys() | self._settings)
            if found.get(key) != self._settings.get(key)
        ]
        if differing:
            raise ValueError(f"{self.path} was begun with other settings: {'; '.join(differing)}. {_ANEW}")
