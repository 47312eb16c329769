"""What has been collected of an anchor so far, in files from which a killed collection goes on."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import safetensors
from safetensors.torch import save_file
from torch import Tensor

from hf_aegis.anchors.shares import Share
from hf_aegis.atomic_files import replacing
from hf_aegis.format_version import check_format_version, written_version
from hf_aegis.json_files import parse_json_object, require_keys


logger = logging.getLogger(__name__)

_KIND = "partial collection"
# In the header of a file, where only strings are; JSON.
_HEADER = "partial_collection"


class Snapshot(NamedTuple):
    """
    Sums over batches.

    Attributes:
        tensors (`dict[str, Tensor]`): As exact as the sums are themselves.
        fields (`dict[str, Any]`): What JSON can hold.
    """

    tensors: dict[str, Tensor]
    fields: dict[str, Any]


class Resumable(Protocol):
    """What sums over batches, and can go on from earlier sums."""

    def snapshot(self) -> Snapshot:
        """The sums so far."""

    def restore(self, snapshot: Snapshot) -> bool:
        """
        Goes on from earlier sums; `False`, and nothing done, if they are of something else.

        Raises:
            ValueError: if tensors or fields are not those of such sums.
        """


class PartialCollection:
    """
    A process's sums over its batches, a file for each pass over them. A file is replaced as a whole, and a pass that
    is over is not written again, so that what a killed process leaves is whatever it saved last.

    Args:
        folder (`str` or `os.PathLike`): Where the files are; created when something is saved.
        settings (`Mapping[str, Any]`): What the sums depend on, as JSON can hold it.
        every (`int`, *optional*, defaults to 20): How many batches lie between two saves.
        share ([`Share`], *optional*): Of the process; all batches by default.

    Raises:
        ValueError: if `every` is below 1, or the folder holds sums of another number of processes.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        settings: Mapping[str, Any],
        *,
        every: int = 20,
        share: Share | None = None,
    ):
        if every < 1:
            raise ValueError(f"save_batches must be at least 1, found {every}")
        self.folder = Path(folder)
        self.every = every
        self._share = share or Share()
        # As they will be read again: lists in the place of tuples.
        self._settings = json.loads(json.dumps(settings))
        sizes = {path.stem.rpartition("-of-")[2] for path in self.folder.glob("*-of-*.safetensors")}
        if others := sizes - {str(self._share.size)}:
            raise ValueError(
                f"{self.folder} holds what {', '.join(sorted(others))} processes have collected, found "
                f"{self._share.size}: continue with as many, or delete the folder to begin anew"
            )

    def begin(self, name: str, sums: Resumable) -> int:
        """
        Has a pass go on from what was saved of it.

        Args:
            name (`str`): Of the pass.
            sums ([`Resumable`]): Its sums, empty.

        Returns:
            `int`: how many batches they are of now.

        Raises:
            ValueError: if the file is no such file, has a newer format, or its settings are others; they are named.
        """
        path = self._path(name)
        if not path.exists():
            return 0
        header, tensors = _read(path)
        found, expected = header["settings"], self._settings
        if differences := [
            f"{key}: found {found.get(key)!r}, expected {expected.get(key)!r}"
            for key in sorted({*found, *expected})
            if found.get(key) != expected.get(key) or (key in found) != (key in expected)
        ]:
            raise ValueError(
                f"{path} was begun with other settings ({'; '.join(differences)}): give those again to continue, or "
                f"delete {self.folder} to begin anew"
            )
        try:
            restored = sums.restore(Snapshot(tensors, header["fields"]))
        except ValueError as error:
            raise _no_part(path, error) from error
        if not restored:
            logger.warning("%s is of directions that are no longer the same; this pass begins anew", path)
            return 0
        return header["batches"]

    def batch_done(self, name: str, batches: int, sums: Resumable) -> None:
        """Saves the sums over so many batches, if it is time to."""
        if batches % self.every == 0:
            self._save(name, batches, sums)

    def pass_done(self, name: str, batches: int, sums: Resumable) -> None:
        """Saves the sums over all batches, unless that was done with the last one."""
        if batches % self.every != 0:
            self._save(name, batches, sums)

    def _save(self, name: str, batches: int, sums: Resumable) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors, fields = sums.snapshot()
        header = {**written_version(_KIND), "batches": batches, "settings": self._settings, "fields": fields}
        with replacing(self._path(name)) as staged:
            save_file(
                {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()},
                staged,
                {_HEADER: json.dumps(header)},
            )

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}-{self._share.rank}-of-{self._share.size}.safetensors"


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise _no_part(path, error) from error
    if _HEADER not in metadata:
        raise _no_part(path, f"its header has no key {_HEADER!r}")
    header = parse_json_object(metadata[_HEADER], f"{path}, {_HEADER}")
    check_format_version(header, _KIND, f"{path}, {_HEADER}")
    require_keys(header, {"settings": dict, "fields": dict, "batches": int}, f"{path}, {_HEADER}")
    if header["batches"] < 0:
        raise _no_part(path, f"key 'batches' is {header['batches']}")
    return header, tensors


def _no_part(path: Path, reason: object) -> ValueError:
    return ValueError(f"{path} holds no part of a collection: {reason}; delete {path.parent} to begin anew")
