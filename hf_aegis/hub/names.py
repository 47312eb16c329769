"""Which names are ids on the Hub."""

import re
from pathlib import Path


_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_repo_id(name: str | None) -> bool:
    """Whether a name reads as `"org/name"`, and is no file or folder here, such as `outputs/anchor`."""
    return name is not None and _REPO_ID.fullmatch(name) is not None and not Path(name).exists()
