"""Dataset statistics as a JSON file."""

import json
import os

from hf_aegis.atomic_files import write_text
from hf_aegis.format_version import FORMAT_KEY, check_format_version, written_version
from hf_aegis.functional.normalization import DatasetStatistics
from hf_aegis.json_files import read_json_object


_KIND = "dataset statistics"


def save_statistics(statistics: DatasetStatistics, path: str | os.PathLike) -> None:
    """Writes statistics as JSON, atomically; every float survives exactly."""
    write_text(path, json.dumps({**written_version(_KIND), **statistics.to_dict()}, indent=2) + "\n")


def load_statistics(path: str | os.PathLike) -> DatasetStatistics:
    """
    Reads what `save_statistics` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not JSON, does not hold statistics, or has a newer format; the message names the file.
    """
    values = read_json_object(path)
    check_format_version(values, _KIND, os.fspath(path))
    try:
        return DatasetStatistics.from_dict({key: value for key, value in values.items() if key != FORMAT_KEY})
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: not dataset statistics: {error}") from error
