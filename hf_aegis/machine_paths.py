"""What is published about a run says what was run, and not where on whose machine."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar


T = TypeVar("T")

# Where huggingface_hub keeps what it has downloaded.
_SNAPSHOT = re.compile(r"(?:models|datasets|spaces)--([^/]+)/snapshots/([0-9a-f]{40})/?$")

# A path from the root at the start of a word, of a quoted text or of an option's value; no address, as "https://a/b".
_ABSOLUTE = re.compile(r"""(?<![^\s'"=(\[{,])/(?:[^\s/'"=(),:;\]}]+/)*([^\s/'"=(),:;\]}]+)/?""")


def without_machine_paths(value: T, base: Path | None = None) -> T:
    """
    Text in which absolute paths inside the working directory have become relative to it, and of others the last name
    is left: of `--output_dir /home/me/outputs/compare` in `/home/me`, `outputs/compare`; of a model in `/data/vlm`,
    `vlm`.

    Args:
        value: A text; or a mapping or list, whose texts are replaced at any depth; anything else comes back as it is.
        base (`Path`, *optional*): In the place of the working directory.
    """
    here = f"{(base or Path.cwd()).resolve()}/"

    def shorten(found: re.Match[str]) -> str:
        path = found[0]
        return path.removeprefix(here) if path.startswith(here) and len(path) > len(here) else found[1]

    def replace(item: Any) -> Any:
        if isinstance(item, str):
            return _ABSOLUTE.sub(shorten, item)
        if isinstance(item, Mapping):
            return {key: replace(own) for key, own in item.items()}
        return [replace(own) for own in item] if isinstance(item, list) else item

    return replace(value)


def portable_name(source: str | os.PathLike[str]) -> str:
    """
    What a model, anchor or data set is called on any machine: an id on the Hub stays as it is, of a path the last name
    is left, and a snapshot in the Hub's cache has the id that it was downloaded by.
    """
    path = os.fspath(source)
    if found := _SNAPSHOT.search(path):
        return found[1].replace("--", "/")
    # An id that is also a folder here is the folder.
    return Path(path).resolve().name if Path(path).is_absolute() or Path(path).exists() else path


def snapshot_commit(source: str | os.PathLike[str]) -> str | None:
    """The commit of a snapshot in the Hub's cache; `None` of anything else."""
    found = _SNAPSHOT.search(os.fspath(source))
    return found[2] if found else None
