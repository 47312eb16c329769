"""Reads the tasks and demonstrations of a LIBERO HDF5 file and checks them against the format.

The same checks serve a reader that must stop at the first problem and an inspection that must find them all: every
problem goes to a `report` callable, which raises (`refuse`) or collects (`list.append`).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from hf_aegis.data.libero_files import Report, read_child, refuse
from hf_aegis.data.libero_format import (
    ACTION_DIMENSION,
    CAMERAS,
    STATE_FEATURES,
    LiberoConvention,
    LiberoFormatError,
    integer_attribute,
    read_convention,
    text_attribute,
)
from hf_aegis.data.libero_frames import check_frames, frames_key, read_rows, refuse_bloated
from hf_aegis.json_files import parse_json_object


_DEMONSTRATION_NAME = re.compile(r"demo_(\d+)")


@dataclass(frozen=True)
class Demonstration:
    """
    One checked demonstration.

    Args:
        path (`str`): its HDF5 path.
        actions (`np.ndarray` of shape `(T, 7)`, float64): as stored.
        state (`np.ndarray` of shape `(T, 9)`, float64): joint positions (rad), then gripper fingers (m).
        image_sizes (`tuple[int, ...]`): side of each camera's square frames, in pixels.
    """

    path: str
    actions: np.ndarray
    state: np.ndarray
    image_sizes: tuple[int, ...]


@dataclass(frozen=True)
class RecordedTask:
    """
    One `data` group.

    Args:
        file (`str`): the file's path.
        path (`str`): the group's HDF5 path.
        suite (`str`, *optional*): from the combined file's group, else from `bddl_file_name`, else from the folder.
        name (`str`): from the combined file's group, else the file's name without `_demo`.
        instruction (`str`): what the robot is told to do.
        convention (`LiberoConvention`): how frames and observations are stored.
        demonstrations (`tuple[str, ...]`): HDF5 paths, in the order of their numbers.
    """

    file: str
    path: str
    suite: str | None
    name: str
    instruction: str
    convention: LiberoConvention
    demonstrations: tuple[str, ...]


def read_task(
    group: h5py.Group, report: Report = refuse, image_origin: str = "auto", observation: str = "auto"
) -> RecordedTask | None:
    """
    Reads what a `data` group says of itself.

    Args:
        group (`h5py.Group`): a `data` group.
        report (`Callable`, *optional*): receives every problem; raises the first by default.
        image_origin (`str`, *optional*, defaults to `"auto"`): see `read_convention`.
        observation (`str`, *optional*, defaults to `"auto"`): see `read_convention`.

    Returns:
        `RecordedTask`, or `None` where a problem was reported that leaves the task unreadable.
    """

    def problem(location: str, text: str) -> None:
        report(LiberoFormatError.at(group.file.filename, group.name + location, text))

    names = {}
    for name in group:
        match = _DEMONSTRATION_NAME.fullmatch(name)
        if match is None:
            problem(f"/{name}", "unexpected entry, expected groups called demo_<number>")
        elif isinstance(read_child(group, name, report), h5py.Group):
            names[name] = int(match[1])
        else:
            problem(f"/{name}", "expected a group")
    if not names:
        problem("", "no demonstrations, expected groups called demo_<number>")
    for key, expected in (("num_demos", len(names)), ("total", _total_samples(group, list(names)))):
        try:
            stated = integer_attribute(group.attrs, key)
        except ValueError as error:
            problem(f"@{key}", str(error))
        else:
            if expected is not None and stated != expected:
                problem(f"@{key}", f"says {stated}, the demonstrations make {expected}")

    instruction = convention = None
    try:
        instruction = _instruction(group)
    except ValueError as error:
        problem("@problem_info", str(error))
    try:
        convention = read_convention(group.attrs, image_origin, observation)
    except ValueError as error:
        problem("", str(error))
    if instruction is None or convention is None or not names:
        return None
    suite, name = suite_and_name(group)
    return RecordedTask(
        file=group.file.filename,
        path=group.name,
        suite=suite,
        name=name,
        instruction=instruction,
        convention=convention,
        demonstrations=tuple(f"{group.name}/{name}" for name in sorted(names, key=names.__getitem__)),
    )


def suite_and_name(group: h5py.Group) -> tuple[str | None, str]:
    """Suite (where it can be told) and name of the task in a `data` group."""
    above = group.name.strip("/").split("/")[:-1]
    if above:
        return (above[0] if len(above) > 1 else None), above[-1]
    file = Path(group.file.filename).resolve()
    candidates = [file.parent.name]
    if "bddl_file_name" in group.attrs:
        candidates.insert(0, Path(text_attribute(group.attrs, "bddl_file_name")).parent.name)
    suite = next((name for name in candidates if name.startswith("libero_")), None)
    return suite, file.stem.removesuffix("_demo")


def read_demonstration(
    group: h5py.Group, convention: LiberoConvention, cameras: Sequence[str] = CAMERAS, report: Report = refuse
) -> Demonstration | None:
    """
    Reads the actions and states of a demonstration and checks everything but the frames' pixels.

    Args:
        group (`h5py.Group`): a `demo_<number>` group.
        convention (`LiberoConvention`): of its task.
        cameras (`Sequence[str]`, *optional*): cameras whose frames are needed.
        report (`Callable`, *optional*): receives every problem; raises the first by default.

    Returns:
        `Demonstration`, or `None` where a problem was reported.
    """
    problems = 0

    def problem(location: str, text: str) -> None:
        nonlocal problems
        problems += 1
        report(LiberoFormatError.at(group.file.filename, location, text))

    def forward(error: LiberoFormatError) -> None:
        nonlocal problems
        problems += 1
        report(error)

    datasets = {name: child for name in group if isinstance(child := read_child(group, name, forward), h5py.Dataset)}
    observations = read_child(group, "obs", forward) if "obs" in group else None
    if isinstance(observations, h5py.Group):
        for name in observations:
            if isinstance(child := read_child(observations, name, forward), h5py.Dataset):
                datasets[f"obs/{name}"] = child

    widths = {"actions": ACTION_DIMENSION} | {f"obs/{name}": width for name, width in STATE_FEATURES.items()}
    frames = [f"obs/{frames_key(camera, convention)}" for camera in cameras]
    for name in [*widths, *frames]:
        if name not in datasets:
            problem(f"{group.name}/{name}", f"missing dataset, found {sorted(datasets)}")

    arrays = {}
    for name, width in widths.items():
        if name in datasets:
            try:
                arrays[name] = _read_numeric(datasets[name], width)
            except LiberoFormatError as error:
                forward(error)
    for name in frames:
        if name in datasets and (text := check_frames(datasets[name], convention)):
            problem(datasets[name].name, text)

    if "actions" in datasets and datasets["actions"].ndim:
        length = datasets["actions"].shape[0]
        if length <= convention.action_offset:
            reason = " (its observations follow the actions, so one action is left without one)" if length else ""
            problem(group.name, f"too short: {length} steps, expected at least {convention.action_offset + 1}{reason}")
        for dataset in datasets.values():
            if dataset.shape is None or dataset.ndim == 0 or dataset.shape[0] != length:
                problem(dataset.name, f"shape {dataset.shape}, expected {length} rows as in {group.name}/actions")
        try:
            stated = integer_attribute(group.attrs, "num_samples")
        except ValueError as error:
            problem(f"{group.name}@num_samples", str(error))
        else:
            if stated != length:
                problem(f"{group.name}@num_samples", f"says {stated}, {length} actions found")
    if problems:
        return None
    return Demonstration(
        path=group.name,
        actions=arrays["actions"],
        state=np.concatenate([arrays[f"obs/{name}"] for name in STATE_FEATURES], axis=1),
        image_sizes=tuple(convention.image_size or datasets[name].shape[1] for name in frames),
    )


def _read_numeric(dataset: h5py.Dataset, width: int) -> np.ndarray:
    file, shape = dataset.file.filename, dataset.shape
    if not np.issubdtype(dataset.dtype, np.floating) or shape is None or len(shape) != 2 or shape[1] != width:
        raise LiberoFormatError.at(
            file,
            dataset.name,
            f"expected floating point of shape (T, {width}), found {dataset.dtype} of shape {shape}",
        )
    refuse_bloated(dataset)
    values = read_rows(dataset, slice(None)).astype(np.float64)
    # Items are float32: what overflows there is as unusable as infinity.
    usable = np.abs(values) <= np.finfo(np.float32).max
    if not usable.all():
        step, column = np.argwhere(~usable)[0].tolist()
        raise LiberoFormatError.at(
            file,
            dataset.name,
            f"{int((~usable).sum())} values are NaN or infinite in float32, first at step {step}, column {column}",
        )
    return values


def _total_samples(group: h5py.Group, names: Sequence[str]) -> int | None:
    """Sum of `num_samples`; `None` where one is unreadable, which is reported with its demonstration."""
    try:
        return sum(integer_attribute(group[name].attrs, "num_samples") for name in names)
    except ValueError:
        return None


def _instruction(group: h5py.Group) -> str:
    information = parse_json_object(text_attribute(group.attrs, "problem_info"), "its text")
    value = information.get("language_instruction")
    # Released files hold a string, some of them within quotation marks; LIBERO itself joins and strips them too.
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = "".join(value)
    instruction = value.strip().strip('"').strip() if isinstance(value, str) else ""
    if not instruction:
        raise ValueError(f"expected a non-empty 'language_instruction', found {information}")
    return instruction
