"""Puts many LIBERO demonstration files into one."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import h5py
from tqdm import tqdm

from hf_aegis.data.libero_files import find_data_groups, naming_damage, open_libero_file, resolve_files
from hf_aegis.data.libero_hdf5 import read_demonstration, read_task
from hf_aegis.data.libero_writer import replacing_hdf5


logger = logging.getLogger(__name__)

# The compact group layout, readable since HDF5 1.10: "latest" would lock out readers older than the writer.
_LIBRARY_VERSIONS = ("v110", "v114")


def combine(
    paths: str | os.PathLike | Sequence[str | os.PathLike],
    output: str | os.PathLike,
    *,
    suite: str | None = None,
    overwrite: bool = False,
) -> Path:
    """
    Copies every task of the given files to `<suite>/<task>/data` of one new file.

    A `data` group is copied verbatim, attributes included, after its layout, actions and states have been checked;
    what lies outside it (e.g. robomimic's `mask`) is left behind. The output appears complete or not at all.

    Args:
        paths (`str`, `os.PathLike` or a sequence of them): files, or folders that stand for every `*.hdf5` below.
        output (`str` or `os.PathLike`): the file to write; its folder is created where it is missing.
        suite (`str`, *optional*): the suite of tasks whose file does not tell. It is told by the group of a combined
            file, else by the folder of `bddl_file_name`, else by the file's own folder (`libero_*`).
        overwrite (`bool`, *optional*, defaults to `False`): replace an existing output.

    Returns:
        `Path`: the output.

    Raises:
        FileExistsError: the output exists and `overwrite` is not set.
        LiberoFormatError: an input is not what it should be.
        ValueError: the output is among the inputs, a task appears twice, or a task's suite cannot be told.
    """
    output = Path(output)
    files = resolve_files(paths)
    if output.resolve() in {Path(file).resolve() for file in files}:
        raise ValueError(f"{output}: the output is one of the inputs")
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output}: exists already, pass overwrite=True (--overwrite) to replace it")
    if suite is not None and (not suite or "/" in suite):
        raise ValueError(f"'suite' must be a plain name, found {suite!r}")

    origins: dict[str, str] = {}
    with replacing_hdf5(output, libver=_LIBRARY_VERSIONS) as target:
        for path in tqdm(files, desc="combine", unit="file", delay=2):
            with open_libero_file(path) as source, naming_damage(path):
                for group in find_data_groups(source):
                    _copy(group, target, suite, origins)
    logger.info("wrote %d tasks to %s", len(origins), output)
    return output


def _copy(group: h5py.Group, target: h5py.File, suite: str | None, origins: dict[str, str]) -> None:
    origin = f"{group.file.filename}: {group.name}"
    task = read_task(group)
    assert task is not None  # the strict report raises instead
    for demonstration in task.demonstrations:
        read_demonstration(group.file[demonstration], task.convention)
    if (task.suite or suite) is None:
        raise ValueError(f"{origin}: its suite cannot be told, pass suite=... (--suite)")
    destination = f"{task.suite or suite}/{task.name}"
    if destination in origins:
        raise ValueError(f"{origin}: the task {destination} is there already, from {origins[destination]}")
    origins[destination] = origin
    group.file.copy(group, target.create_group(destination), name="data")
