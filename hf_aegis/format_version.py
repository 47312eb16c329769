"""Versions of the formats of files that this package writes to read them again."""

from collections.abc import Mapping
from typing import Any


FORMAT_KEY = "format_version"
"""Key of a file's format version. Files of before there were versions have none, and are of the first."""

NEWEST_VERSIONS = {
    "activation anchor": 3,
    "partial collection": 1,
    "dataset statistics": 1,
    "demonstrations": 1,
    "recording": 1,
    "policy": 1,
    "policy processor": 1,
    "FAST tokenizer": 1,
    "GSE adapter": 1,
    "expert average": 1,
    "callback state": 1,
    "training result": 1,
    "comparison": 1,
    "demo": 1,
    "VQA scores": 1,
    "VQA predictions": 1,
    "rollout scores": 1,
    "episodes": 1,
}
"""
By kind of file, the newest format version that this package reads, and, but for anchors, the one that it writes. A
version rises where older packages would misread what newer ones write. Logs and figures' data in a run's folder are of
the version that its result says.
"""


def written_version(kind: str) -> dict[str, int]:
    """The key and the version that files of a kind are written with."""
    return {FORMAT_KEY: NEWEST_VERSIONS[kind]}


def check_format_version(values: Mapping[str, Any], kind: str, where: object) -> int:
    """
    The format version of a file.

    Args:
        values (`Mapping[str, Any]`): What the file says of itself.
        kind (`str`): One of [`NEWEST_VERSIONS`].
        where (`Any`): The file, and the place in it, for messages.

    Returns:
        `int`: 1 for a file that does not say.

    Raises:
        ValueError: if the version is no positive integer, or newer than what can be read; both versions and the remedy
            are named.
    """
    found, newest = values.get(FORMAT_KEY, 1), NEWEST_VERSIONS[kind]
    if type(found) is not int or found < 1:
        raise ValueError(f"{where}: key {FORMAT_KEY!r} is {found!r} ({kind}), expected an integer from 1 to {newest}")
    if found > newest:
        raise ValueError(
            f"{where}: key {FORMAT_KEY!r} is {found} ({kind}), this version of hf-aegis reads 1 to {newest}; "
            "a newer file needs a newer hf-aegis"
        )
    return found
