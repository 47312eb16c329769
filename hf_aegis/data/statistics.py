"""Dataset statistics as a JSON file."""

import json
import os
from pathlib import Path

from hf_aegis.atomic_files import write_text
from hf_aegis.functional.normalization import DatasetStatistics


def save_statistics(statistics: DatasetStatistics, path: str | os.PathLike) -> None:
    """Writes statistics as JSON, atomically; every float survives exactly."""
    write_text(path, json.dumps(statistics.to_dict(), indent=2) + "\n")


def load_statistics(path: str | os.PathLike) -> DatasetStatistics:
    """
    Reads what `save_statistics` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not JSON, or does not hold statistics; the message names the file.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        return DatasetStatistics.from_dict(json.loads(text))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{os.fspath(path)}: not dataset statistics: {error}") from error
