"""A file of JSON lines, one per record of a run, that a resumed run continues."""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hf_aegis.atomic_files import write_text
from hf_aegis.json_files import parse_json_object


METRICS_FILE = "metrics.jsonl"
"""What a training run logs."""
PROJECTION_FILE = "projection.jsonl"
"""What each projected backward pass of a training run did."""
EXPERTS_FILE = "experts.jsonl"
"""How a training run's routers spread the tokens over the experts."""

# Far beyond any training. Figures keep a place for each step.
_LAST_STEP = 10_000_000


def finite_json(value: Any) -> Any:
    """`value` with `None` for every number that is not finite, which JSON cannot express."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_json(item) for item in value]
    return value


class JSONLines:
    """
    Appends records to a file, each with a `step`. Numbers that are not finite are written as `null`.

    Args:
        path (`str` or `os.PathLike`): The file; its folder is created.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)

    def rewind(self, step: int) -> None:
        """Drops the records of later steps than `step`, which a resumed run will write again; all of them for zero."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [] if step == 0 or not self.path.exists() else [r for r in self.read() if r["step"] <= step]
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Writes records at the end, in the place of a line that a killed process left half-written."""
        lines = b"".join(json.dumps(finite_json(record), allow_nan=False).encode() + b"\n" for record in records)
        try:
            with self.path.open("ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":
                        file.truncate(self.path.read_bytes().rfind(b"\n") + 1)
                file.write(lines)
        except OSError as error:
            # The system does not say where a disk is full.
            error.filename = str(self.path)
            raise

    def read(self) -> list[dict[str, Any]]:
        """
        All whole records; a last line that a killed process left half-written is passed over.

        Raises:
            OSError: If the file cannot be read.
            ValueError: If a line is no JSON object, or has no step; the line is named.
        """
        records = []
        content = self.path.read_bytes()
        # Only a last line without its end may be half-written.
        whole = content.rfind(b"\n") + 1
        # Not `splitlines`: a line separator of Unicode may stand inside a JSON string.
        for number, line in enumerate(content[:whole].split(b"\n")[:-1], start=1):
            records.append(self._record(line, number))
        if rest := content[whole:]:
            with contextlib.suppress(ValueError):
                records.append(self._record(rest, len(records) + 1))
        return records

    def _record(self, line: bytes, number: int) -> dict[str, Any]:
        record = parse_json_object(line, f"{self.path}, line {number}")
        if type(step := record.get("step")) is not int or not 0 <= step <= _LAST_STEP:
            raise ValueError(
                f"{self.path}, line {number}: key 'step' is {step!r}, expected an integer from 0 to {_LAST_STEP:,}"
            )
        return record
