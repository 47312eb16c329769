"""Demonstration files: naming, opening, and walking them without leaving them."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import h5py

from hf_aegis.data.libero_format import LiberoFormatError


Report = Callable[[LiberoFormatError], None]
"""Receives each problem found; raises it or collects it."""

# `/data` in a released file, `/<suite>/<task>/data` in a combined one.
_DEEPEST_DATA_GROUP = 3


def refuse(error: LiberoFormatError) -> None:
    """The strict `Report`: raises the problem."""
    raise error


def resolve_files(paths: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str]:
    """
    The HDF5 files that one or several paths name; a folder stands for every `*.hdf5` below it, sorted.

    Raises:
        FileNotFoundError: a path does not exist, or a folder holds no HDF5 file.
        ValueError: no paths, or the same file twice.
    """
    files: list[Path] = []
    for path in [paths] if isinstance(paths, str | os.PathLike) else list(paths):
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        found = sorted(path.rglob("*.hdf5")) if path.is_dir() else [path]
        if not found:
            raise FileNotFoundError(f"{path}: no *.hdf5 file in this folder")
        files.extend(found)
    if not files:
        raise ValueError("no demonstration files given")
    resolved = [file.resolve() for file in files]
    for index, file in enumerate(resolved):
        if file in resolved[:index]:
            raise ValueError(f"{files[index]}: given twice")
    return [str(file) for file in files]


def open_libero_file(path: str | os.PathLike, *, chunk_cache: bool = True) -> h5py.File:
    """
    Opens a demonstration file for reading.

    Args:
        path (`str` or `os.PathLike`): the file.
        chunk_cache (`bool`, *optional*, defaults to `True`): whether each open dataset keeps the chunks it read last.
            It helps to read rows in order, and costs memory for each dataset that stays open.

    Raises:
        FileNotFoundError: there is no such file.
        LiberoFormatError: the file is empty, not HDF5, or truncated.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    size = os.path.getsize(path)
    if size == 0:
        raise LiberoFormatError(f"{path}: empty file (0 bytes), expected HDF5")
    if not h5py.is_hdf5(path):
        raise LiberoFormatError(f"{path}: not an HDF5 file ({size} bytes without an HDF5 signature)")
    try:
        return h5py.File(path, "r") if chunk_cache else h5py.File(path, "r", rdcc_nbytes=0)
    except OSError as error:
        raise LiberoFormatError(f"{path}: HDF5 cannot open it, it may be truncated: {error}") from error


@contextmanager
def naming_damage(path: str | os.PathLike) -> Iterator[None]:
    """
    Names the file where HDF5 stumbles over a damaged structure, which h5py reports as one of several exceptions. Only
    for code that reads this file: whatever raises these exceptions inside is blamed on it.

    Raises:
        LiberoFormatError: in place of whichever of the exceptions below h5py raised.
        OSError: of the operating system, as it is: a file that is gone or a full disk is no damage.
    """
    try:
        yield
    except (KeyError, OSError, RuntimeError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise LiberoFormatError(f"{os.fspath(path)}: damaged HDF5 structure: {error}") from error


def find_data_groups(file: h5py.File, report: Report = refuse) -> list[h5py.Group]:
    """
    Every `data` group of a file, sorted by path. Problems reported: links that leave the file or alias a place in it
    (external and soft links), and a file without any `data` group.
    """
    found: list[h5py.Group] = []

    def search(group: h5py.Group, depth: int) -> None:
        for name in sorted(group):
            child = read_child(group, name, report)
            if isinstance(child, h5py.Group):
                if name == "data":
                    found.append(child)
                elif depth < _DEEPEST_DATA_GROUP:
                    search(child, depth + 1)

    search(file, 1)
    if not found:
        report(
            LiberoFormatError.at(
                file.filename, "/", f"no 'data' group here or at <suite>/<task>/data, found {sorted(file)}"
            )
        )
    return found


def read_child(group: h5py.Group, name: str, report: Report) -> h5py.Group | h5py.Dataset | None:
    """A group's entry, unless it is a link or has its data elsewhere: a file must not make others be read."""
    location = f"{group.name.rstrip('/')}/{name}"
    link = group.get(name, getlink=True)
    if link is None:
        report(LiberoFormatError.at(group.file.filename, location, "damaged HDF5 link"))
        return None
    if not isinstance(link, h5py.HardLink):
        target = f"{link.filename}:{link.path}" if isinstance(link, h5py.ExternalLink) else link.path
        kind = "an external" if isinstance(link, h5py.ExternalLink) else "a soft"
        report(LiberoFormatError.at(group.file.filename, location, f"{kind} link (to {target}), links are refused"))
        return None
    child = group[name]
    if not isinstance(child, h5py.Dataset):
        # Groups within themselves never end.
        if (names := h5py.h5o.get_info(child.id).rc) > 1:
            problem = f"a group with {names} names, of which one may lead into another, which is refused"
            report(LiberoFormatError.at(group.file.filename, location, problem))
            return None
        return child
    try:
        _ = child.dtype
    except (TypeError, ValueError) as error:
        report(LiberoFormatError.at(group.file.filename, location, f"a type that cannot be read: {error}"))
        return None
    if child.is_virtual or child.external:
        report(LiberoFormatError.at(group.file.filename, location, "its data lies in other files, which is refused"))
        return None
    return child
