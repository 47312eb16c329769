"""Answers of the Hub, before huggingface_hub makes names and sizes of files of what they say."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.utils import get_session


# The cache's files are named by these.
_NAMING = ("etag", "x-linked-etag", "x-repo-commit")
_SIZING = ("content-length", "x-linked-size")
_MOST_DIGITS = 18  # almost an exabyte


@contextmanager
def checked_answers() -> Iterator[None]:
    """
    While it lasts, an answer is refused that would name a file by a path: huggingface_hub takes an `ETag` for the name
    of a file in its cache, and with `../` in it, or `/` before it, would write and read elsewhere. So is one that
    tells a size that no file has, with which it would reckon.

    Raises:
        ValueError: of such an answer, in the call that gets it.
    """
    # The client is shared by all of the process; what is asked beside is checked as well, which does no harm.
    hooks: list[Any] = get_session().event_hooks["response"]
    hooks.append(_check)
    try:
        yield
    finally:
        hooks.remove(_check)


def _check(response: Any) -> None:
    for name in _NAMING:
        said = response.headers.get(name)
        if said is None:
            continue
        # As huggingface_hub takes it apart.
        value = said.lstrip("W/").strip('"')
        if value in ("", ".", "..") or not value.isprintable() or "/" in value or "\\" in value:
            raise ValueError(f"the Hub's answer names a file by a path: {name} is {said[:60]!r}")
    for name in _SIZING:
        said = response.headers.get(name)
        if said is not None and not (said.isdecimal() and len(said) <= _MOST_DIGITS):
            raise ValueError(f"the Hub's answer tells a size that no file has: {name} is {said[:60]!r}")
