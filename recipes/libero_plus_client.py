"""
Episodes of LIBERO-plus (arXiv 2510.13626), acted by a policy server.

Runs in an environment of its own, made and started by `libero_plus.py`: LIBERO-plus needs numpy < 2. It imports
nothing of hf_aegis: what acts is whatever answers openpi's client at the given address.
"""

import argparse
import importlib.util
import json
import re
import sys
import time
import types
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


KINDS = ("camera", "language", "initial_state", "layout", "noise")
"""Disturbances whose assets LIBERO's packages hold; lights, textures and added objects have assets of their own."""

MAX_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520}
"""openpi's step limits."""
SETTLING_STEPS = 10
IMAGE_SIZE = 256
"""LIBERO-plus' disturbances of pictures assume this; the server makes them as small as the model's."""
IDLE = np.array([0.0] * 6 + [-1.0])
UNTOUCHED_VIEW = "0_0_100_0_0"
MOTION_BLUR = range(1, 11)
"""Levels of noise that are drawn by ImageMagick."""


class Variant(NamedTuple):
    """
    A perturbed task.

    `file` is the problem file's name without its ending, which says how cameras, robot and pictures are disturbed;
    `instruction` that of the undisturbed task, empty where another wording is the disturbance; `start` the file of its
    initial states, relative to LIBERO-plus' folder of them.
    """

    file: str
    kind: str
    instruction: str
    start: str
    noise: int = 0


def parse(file: str, suite: str) -> Variant | None:
    """What a variant's name says; `None` for those whose assets are not here."""
    if match := re.fullmatch(r"(.+?)(?:_moved)?_level\d+_sample\d+", file):
        return Variant(file, "layout", _instruction(match[1]), f"libero_newobj/{suite}/{file}.pruned_init")
    match = re.fullmatch(r"(.+?)(_language_\d+)?_view_(.+)_initstate_(\d+)(?:_noise_(\d+))?", file)
    if match is None:
        return None
    task, language, view, robot, noise = match.groups()
    if noise is not None:
        kind = "noise"
    elif language is not None:
        kind = "language"
    elif view != UNTOUCHED_VIEW:
        kind = "camera"
    elif int(robot) != 0:
        kind = "initial_state"
    else:
        return None
    instruction = "" if kind == "language" else _instruction(task)
    return Variant(file, kind, instruction, f"{suite}/{task}.pruned_init", int(noise or 0))


def _instruction(task: str) -> str:
    """LIBERO's own evaluation takes it from the name too, of which `KITCHEN_SCENE3_` is not a part."""
    return re.sub(r"^[A-Z_]+SCENE\d+_", "", task).replace("_", " ")


def installed_folder() -> Path:
    """Where LIBERO-plus is installed, without importing it, which takes long."""
    spec = importlib.util.find_spec("liberoplus")
    assert spec is not None and spec.origin is not None, "LIBERO-plus is not installed: start libero_plus.py instead"
    return Path(spec.origin).parent / "liberoplus"


def task_names(folder: Path, suite: str) -> list[str]:
    """All variants of a suite. Their list is read alone: the package around it imports torch."""
    path = folder / "benchmark" / "libero_suite_task_map.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.libero_task_map[suite])


def choose(variants: list[Variant], kinds: list[str], per_kind: int, seed: int) -> list[Variant]:
    """`per_kind` variants of each kind, drawn with a seed: the same ones whichever other kinds are asked for."""
    chosen = []
    for kind in kinds:
        of_kind = [variant for variant in variants if variant.kind == kind]
        order = np.random.default_rng([seed, KINDS.index(kind)]).permutation(len(of_kind))
        chosen += [of_kind[index] for index in order[:per_kind]]
    return chosen


def read_start(path: Path) -> np.ndarray:
    """
    The first of a task's initial states, `(state_dim,)`.

    The files are pickles in torch's archive format; they hold one array, and nothing else is loaded from them.
    """
    import pickle

    class ArrayUnpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            allowed = {
                ("numpy.core.multiarray", "_reconstruct"),
                # As numpy 2 names it.
                ("numpy._core.multiarray", "_reconstruct"),
                ("numpy", "ndarray"),
                ("numpy", "dtype"),
                ("_codecs", "encode"),
            }
            if (module, name) not in allowed:
                raise pickle.UnpicklingError(f"{path}: expected an array, found {module}.{name}")
            return super().find_class(module, name)

    with zipfile.ZipFile(path) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        with archive.open(member) as file:
            states = np.asarray(ArrayUnpickler(file).load(), dtype=np.float64)
    return states.reshape(-1, states.shape[-1])[0]


def import_wrapper() -> tuple[Any, bool]:
    """LIBERO-plus' environments, and whether ImageMagick is there; without it, only motion blur cannot be drawn."""
    magick = True
    try:
        import wand.api  # noqa: F401
    except ImportError:
        magick = False
        api, image = types.ModuleType("wand.api"), types.ModuleType("wand.image")
        api.library = types.SimpleNamespace(MagickMotionBlurImage=types.SimpleNamespace())  # type: ignore[attr-defined]
        image.Image = object  # type: ignore[attr-defined]
        sys.modules.update({"wand": types.ModuleType("wand"), "wand.api": api, "wand.image": image})
    from liberoplus.liberoplus.envs import env_wrapper

    return env_wrapper, magick


class Simulator:
    """A variant's environment: started, stepped, and looked at only when the policy asks."""

    def __init__(self, wrapper: Any, folder: Path, suite: str, variant: Variant, rendering: str):
        self.wrapper, self.variant, self.rendering = wrapper, variant, rendering
        self.env = wrapper.ControlEnv(
            bddl_file_name=str(folder / "bddl_files" / suite / f"{variant.file}.bddl"),
            use_camera_obs=False,
            has_offscreen_renderer=False,
            ignore_done=True,
            hard_reset=False,
        )
        # It would disturb pictures that were not taken.
        self.env.noise = 0
        self.instruction: str = variant.instruction or self.env.language_instruction
        self.env.reset()
        state = read_start(folder / "init_files" / variant.start)
        if variant.kind == "initial_state":
            # The objects' start is the file's; the robot's is what this variant is about.
            state[1:][self.robot._ref_joint_pos_indexes] = self.env.sim.data.qpos[self.robot._ref_joint_pos_indexes]
        self.env.set_init_state(state)
        self.robot.controller.update(force=True)
        self.robot.controller.reset_goal()
        self._context: Any = None
        for _ in range(SETTLING_STEPS):
            self.env.step(IDLE)

    @property
    def robot(self) -> Any:
        return self.env.robots[0]

    def step(self, action: np.ndarray) -> bool:
        self.env.step(action)
        return bool(self.env.check_success())

    def observe(self) -> dict[str, Any]:
        """As openpi's LIBERO example sends it, and the joints beside it."""
        from robosuite.utils import transform_utils

        data = self.env.sim.data
        quaternion = transform_utils.convert_quat(data.get_body_xquat(self.robot.robot_model.eef_name), to="xyzw")
        return {
            "observation/image": self._disturbed(self._render("agentview"))[::-1, ::-1].copy(),
            "observation/wrist_image": self._render("robot0_eye_in_hand")[::-1, ::-1].copy(),
            "observation/state": np.concatenate(
                [
                    data.site_xpos[self.robot.eef_site_id],
                    transform_utils.quat2axisangle(quaternion.copy()),
                    data.qpos[self.robot._ref_gripper_joint_pos_indexes],
                ]
            ),
            "observation/joint_position": np.array(data.qpos[self.robot._ref_joint_pos_indexes]),
            "prompt": self.instruction,
        }

    def close(self) -> None:
        self._context = None
        self.env.close()

    def _render(self, camera: str) -> np.ndarray:
        """As the simulator gives it, bottom row first."""
        if self._context is None:
            import mujoco
            from robosuite.utils import binding_utils

            model = self.env.sim.model
            if self.rendering == "fast":
                model.vis.quality.offsamples, model.vis.quality.shadowsize = 0, 1024
            self._context = binding_utils.MjRenderContextOffscreen(
                self.env.sim, device_id=-1, max_width=IMAGE_SIZE, max_height=IMAGE_SIZE
            )
            self._context.vopt.geomgroup[0], self._context.vopt.geomgroup[1] = 0, 1
            if self.rendering == "fast":
                for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
                    self._context.scn.flags[flag] = 0
        self._context.gl_ctx.make_current()
        self._context.render(IMAGE_SIZE, IMAGE_SIZE, camera_id=self.env.sim.model.camera_name2id(camera))
        return self._context.read_pixels(IMAGE_SIZE, IMAGE_SIZE)

    def _disturbed(self, image: np.ndarray) -> np.ndarray:
        from PIL import Image

        if self.variant.noise == 0:
            return image
        # Ten levels of each.
        draw = ("motion_blur", "gaussian_blur", "zoom_blur", "fog", "glass_blur")[(self.variant.noise - 1) // 10]
        level = (self.variant.noise - 1) % 10 + 1
        return np.asarray(getattr(self.wrapper, draw)(Image.fromarray(image), severity=level)).astype(np.uint8)


class ServerError(RuntimeError):
    """What no other variant would fare better with."""


def run_episode(simulator: Simulator, policy: Any, max_steps: int, replan_steps: int) -> tuple[bool, int]:
    """Success, and the steps it took."""
    actions: list[np.ndarray] = []
    for step in range(max_steps):
        if not actions:
            observation = simulator.observe()
            try:
                actions = list(policy.infer(observation)["actions"][:replan_steps])
            except Exception as error:
                raise ServerError(f"the policy server: {error}") from error
        if simulator.step(np.asarray(actions.pop(0), dtype=np.float64)):
            return True, step + 1
    return False, max_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--settings", required=True, help="JSON object that `libero_plus.py` writes")
    settings = json.loads(parser.parse_args().settings)
    suite, output = settings["suite"], Path(settings["output"])
    episodes = [json.loads(line) for line in output.read_text().splitlines()[1:]]
    # What failed to run is tried again, perhaps after a library was installed.
    done = {episode["variant"] for episode in episodes if "error" not in episode}

    folder = installed_folder()
    variants = [variant for name in task_names(folder, suite) if (variant := parse(name, suite)) is not None]
    chosen = choose(variants, settings["kinds"], settings["per_kind"], settings["seed"])
    remaining = [variant for variant in chosen if variant.file not in done]
    print(f"{len(chosen)} variants, {len(chosen) - len(remaining)} of them finished before", flush=True)
    if not remaining:
        return

    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    policy = WebsocketClientPolicy(settings["host"], settings["port"])
    served = same_model(episodes, policy.get_server_metadata(), output)
    wrapper, magick = import_wrapper()
    for number, variant in enumerate(remaining, 1):
        began = time.perf_counter()
        result: dict[str, Any] = {"variant": variant.file, "kind": variant.kind, "model": served}
        np.random.seed(settings["seed"])
        if variant.noise in MOTION_BLUR and not magick:
            result["error"] = "motion blur is drawn by ImageMagick, whose library libMagickWand was not found"
        else:
            result |= attempt(wrapper, folder, variant, policy, settings)
        result["seconds"] = round(time.perf_counter() - began, 2)
        with output.open("a") as file:
            file.write(json.dumps(result) + "\n")
        outcome = result.get("error") or ("success" if result["success"] else "failure")
        print(f"{number}/{len(remaining)} {variant.kind}: {outcome} ({variant.file})", flush=True)


def same_model(episodes: list[dict[str, Any]], metadata: dict[str, Any], output: Path) -> str | None:
    """What the server says of its model, which is that of the episodes in the file, unless it ends here."""
    served = metadata.get("model")
    if others := {episode.get("model") for episode in episodes} - {served}:
        sys.exit(f"{output} holds episodes of the model {others.pop()}, served is {served}: give another --output")
    return served


def attempt(wrapper: Any, folder: Path, variant: Variant, policy: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """An episode's outcome. What goes wrong in the simulator is its error; what goes wrong with the server is ours."""
    try:
        simulator = Simulator(wrapper, folder, settings["suite"], variant, settings["rendering"])
        try:
            success, steps = run_episode(simulator, policy, settings["max_steps"], settings["replan_steps"])
        finally:
            simulator.close()
    except ServerError:
        raise
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    return {"success": success, "steps": steps, "instruction": simulator.instruction}


if __name__ == "__main__":
    main()
