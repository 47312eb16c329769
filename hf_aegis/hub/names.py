"""Which names are ids on the Hub, and which are files of a repository there."""

import re
from pathlib import Path


_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_repo_id(name: str | None) -> bool:
    """Whether a name reads as `"org/name"`, and is no file or folder here, such as `outputs/anchor`."""
    return name is not None and _REPO_ID.fullmatch(name) is not None and not Path(name).exists()


def is_commit(revision: object) -> bool:
    """Whether a revision is the whole hash of a commit, which means the same for ever."""
    return isinstance(revision, str) and _COMMIT.fullmatch(revision) is not None


def is_file_name(name: object) -> bool:
    """
    Whether a name is a path below a repository's root, as git has them: relative, with `/` between its parts, none of
    them empty, `.` or `..`, and without backslashes, drives or control characters, on any system.
    """
    if not isinstance(name, str) or not name or len(name) > 1024 or not name.isprintable():
        return False
    parts = name.split("/")
    return not any(part in ("", ".", "..") for part in parts) and "\\" not in name and ":" not in parts[0]
