"""What demonstration files hold, and everything that is wrong with them."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import h5py
import numpy as np

from hf_aegis.data.libero_files import find_data_groups, naming_damage, open_libero_file, read_child
from hf_aegis.data.libero_format import CAMERAS, LiberoConvention, LiberoFormatError
from hf_aegis.data.libero_frames import check_frames, frames_key, read_frame, read_rows, refuse_bloated
from hf_aegis.data.libero_hdf5 import Demonstration, RecordedTask, read_demonstration, read_task
from hf_aegis.functional.normalization import MINIMUM_HALF_RANGE, DatasetStatistics, FeatureStatistics, quantile_map


ACTION_NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
STATE_NAMES = (*(f"joint {index}" for index in range(1, 8)), "finger 1", "finger 2")

_BYTES_AT_ONCE = 2**24


@dataclass
class TaskReport:
    """What one task holds: its description and its sound demonstrations' lengths and frame sizes."""

    task: RecordedTask
    lengths: list[int] = field(default_factory=list)
    image_sizes: set[int] = field(default_factory=set)


@dataclass
class FileReport:
    """
    What a file holds.

    Args:
        path (`str`): the file.
        tasks (`list[TaskReport]`): its readable tasks.
        problems (`list[str]`): every problem found, each naming its place.
        statistics (`DatasetStatistics`, *optional*): over all stored steps of the sound demonstrations; `None` where
            there are none.
    """

    path: str
    tasks: list[TaskReport] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    statistics: DatasetStatistics | None = None


def inspect_file(path: str | os.PathLike) -> FileReport:
    """
    Reads a whole file, frames included, and collects every problem instead of stopping at the first.

    Args:
        path (`str` or `os.PathLike`): a demonstration file; one that is missing or unreadable gives a report too.
    """
    report = FileReport(os.fspath(path))
    demonstrations: list[Demonstration] = []
    try:
        with open_libero_file(path) as file, naming_damage(path):
            for group in find_data_groups(file, lambda error: _collect(report, error)):
                _inspect_task(group, report, demonstrations)
    except (LiberoFormatError, FileNotFoundError) as error:
        report.problems.append(str(error))
    if demonstrations:
        report.statistics = DatasetStatistics(
            state=FeatureStatistics.from_samples("state", np.concatenate([one.state for one in demonstrations])),
            actions=FeatureStatistics.from_samples(
                "actions", np.concatenate([each.actions for each in demonstrations])
            ),
        )
    return report


def format_report(report: FileReport) -> str:
    """A report as text for a terminal."""
    lines = [report.path]
    for summary in report.tasks:
        task, lengths = summary.task, summary.lengths
        convention = task.convention
        steps = f"{sum(lengths)} steps ({min(lengths)} to {max(lengths)} each)" if lengths else "no sound steps"
        sizes = ", ".join(f"{size}x{size}" for size in sorted(summary.image_sizes)) or "unknown"
        lines += [
            f"  {task.suite or 'unknown suite'} / {task.name}",
            f"    instruction      {task.instruction}",
            f"    demonstrations   {len(lengths)} sound of {len(task.demonstrations)}, {steps}",
            f"    frames           {convention.frames}, {sizes}, origin {convention.image_origin}",
            f"    observation      {convention.observation.replace('_', ' ')}",
        ]
    if report.statistics is not None:
        lines += _format_statistics("actions", ACTION_NAMES, report.statistics.actions)
        lines += _format_statistics("state (rad, m)", STATE_NAMES, report.statistics.state)
    lines.append(f"  {len(report.problems) or 'no'} problem{'' if len(report.problems) == 1 else 's'}")
    lines += [f"    {problem}" for problem in report.problems]
    return "\n".join(lines)


def _format_statistics(title: str, names: tuple[str, ...], statistics: FeatureStatistics) -> list[str]:
    columns = ("min", "q01", "mean", "q99", "max", "std")
    lines = [f"  {title:<18}" + "".join(f"{column:>10}" for column in columns)]
    still = quantile_map(statistics)[1] <= MINIMUM_HALF_RANGE
    for index, name in enumerate(names):
        values = "".join(f"{getattr(statistics, column)[index]:>10.4f}" for column in columns)
        lines.append(f"    {name:<16}{values}{'   hardly moves' if still[index] else ''}")
    return lines


def _collect(report: FileReport, error: LiberoFormatError) -> None:
    report.problems.append(str(error).removeprefix(f"{report.path}: "))


def _inspect_task(group: h5py.Group, report: FileReport, demonstrations: list[Demonstration]) -> None:
    def collect(error: LiberoFormatError) -> None:
        _collect(report, error)

    task = read_task(group, collect)
    if task is None:
        return
    summary = TaskReport(task)
    report.tasks.append(summary)
    for path in task.demonstrations:
        found_before = len(report.problems)
        demonstration = read_demonstration(group.file[path], task.convention, CAMERAS, collect)
        _inspect_contents(group.file[path], task.convention, report)
        if demonstration is not None and len(report.problems) == found_before:
            demonstrations.append(demonstration)
            summary.lengths.append(len(demonstration.actions))
            summary.image_sizes.update(demonstration.image_sizes)


def _inspect_contents(group: h5py.Group, convention: LiberoConvention, report: FileReport) -> None:
    """What a reader checks only when it needs it: every frame, and the datasets it never needs."""
    for name in ("states", "robot_states"):
        states = _dataset(group, name)
        if states is not None and np.issubdtype(states.dtype, np.floating):
            with _collecting(report):
                _require_finite(states)
    observations = read_child(group, "obs", _ignore) if "obs" in group else None
    if not isinstance(observations, h5py.Group):
        return
    for camera in CAMERAS:
        frames = _dataset(observations, frames_key(camera, convention))
        if frames is None or check_frames(frames, convention):
            continue
        if convention.frames == "jpeg":
            for step in range(frames.shape[0]):
                with _collecting(report):
                    read_frame(frames, step, convention)
        else:
            with _collecting(report):
                rows = max(1, _BYTES_AT_ONCE // math.prod(frames.shape[1:]))
                for start in range(0, frames.shape[0], rows):
                    read_rows(frames, slice(start, start + rows))


def _dataset(group: h5py.Group, name: str) -> h5py.Dataset | None:
    child = read_child(group, name, _ignore) if name in group else None
    return child if isinstance(child, h5py.Dataset) else None


@contextmanager
def _collecting(report: FileReport) -> Iterator[None]:
    try:
        yield
    except LiberoFormatError as error:
        _collect(report, error)


def _require_finite(dataset: h5py.Dataset) -> None:
    refuse_bloated(dataset)
    finite = np.isfinite(read_rows(dataset, slice(None)))
    if not finite.all():
        raise LiberoFormatError.at(
            dataset.file.filename,
            dataset.name,
            f"{int((~finite).sum())} values are NaN or infinite, first at {np.argwhere(~finite)[0].tolist()}",
        )


def _ignore(error: LiberoFormatError) -> None:
    """For links that `read_demonstration` has reported already."""
