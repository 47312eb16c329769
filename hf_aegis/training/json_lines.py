"""A file of JSON lines, one per record of a run, that a resumed run continues."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hf_aegis.atomic_files import write_text


METRICS_FILE = "metrics.jsonl"
"""What a training run logs."""
PROJECTION_FILE = "projection.jsonl"
"""What each projected backward pass of a training run did."""
EXPERTS_FILE = "experts.jsonl"
"""How a training run's routers spread the tokens over the experts."""


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
        """All whole records; a last line that a killed process left half-written is passed over."""
        records = []
        # Not `splitlines`: a line separator of Unicode may stand inside a JSON string.
        lines = self.path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        for number, line in enumerate(lines, start=1):
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                if number < len(lines):
                    raise ValueError(f"{self.path}, line {number}: not JSON ({error})") from error
        return records
