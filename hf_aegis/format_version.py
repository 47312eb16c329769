"""Versions of the formats of files that this package writes to read them again."""

from collections.abc import Mapping
from typing import Any


FORMAT_KEY = "format_version"
"""Key of a file's format version. Files of before there were versions have none, and are of the first."""


def check_format_version(values: Mapping[str, Any], newest: int, where: object) -> int:
    """
    The format version of a file.

    Args:
        values (`Mapping[str, Any]`): What the file says of itself.
        newest (`int`): The newest version that can be read.
        where (`Any`): The file, and the place in it, for messages.

    Returns:
        `int`: from 1 to `newest`; 1 for a file that does not say.

    Raises:
        ValueError: if the version is no positive integer, or newer; both versions and the remedy are named.
    """
    found = values.get(FORMAT_KEY, 1)
    if type(found) is not int or found < 1:
        raise ValueError(f"{where}: key {FORMAT_KEY!r} is {found!r}, expected an integer from 1 to {newest}")
    if found > newest:
        raise ValueError(
            f"{where}: key {FORMAT_KEY!r} is {found}, this version of hf-aegis reads 1 to {newest}; a newer file "
            "needs a newer hf-aegis"
        )
    return found
