"""The LIBERO simulator behind a small interface: reset to a start, step, look, ask for success."""

from types import TracebackType
from typing import Any, Literal

import numpy as np

from hf_aegis.simulation.libero_tasks import LiberoTask, import_simulator


SIMULATOR_CAMERAS = {"agentview_rgb": "agentview", "eye_in_hand_rgb": "robot0_eye_in_hand"}
"""LIBERO's observation names and the simulator's cameras behind them."""

GRIPPER_OPEN, GRIPPER_CLOSE = -1.0, 1.0
ACTION_DIMENSION = 7
SETTLING_STEPS = 10
"""Objects start about 7 cm above their support; LIBERO's evaluation lets them fall for this many idle steps."""


class LiberoEnvironment:
    """
    A LIBERO task in the MuJoCo simulator.

    Actions are `(7,)` in [-1, 1]: translation (one unit asks for 5 cm), rotation as axis-angle (one unit asks for 0.5
    rad), gripper (-1 opens, +1 closes), executed at 20 Hz by an operational-space controller. Images are upright (row
    0 at the top) and are rendered only when asked for: on a CPU a frame costs more than a step.

    What LIBERO draws at random on a reset (the exact poses of fixtures, which initial states do not hold, and object
    placements where no initial state is given) comes from a seed, so that the same start and the same actions give the
    same episode.

    Args:
        task ([`LiberoTask`]): The task.
        image_size (`int`, *optional*, defaults to 128): Height and width of images in pixels.
        supersampling (`int`, *optional*, defaults to 1):
            Images are rendered this many times larger and averaged down, which smooths edges.
        rendering (`"fast"` or `"standard"`, *optional*, defaults to `"fast"`):
            `"fast"` turns off multisampling, shadows and reflections, several times faster on a CPU; `"standard"` is
            LIBERO's own picture, to evaluate policies trained on the released demonstrations.
        seed (`int`, *optional*, defaults to 0): Seed of what a reset draws at random, where `reset` is given none.

    Raises:
        `ImportError`: If the `libero` extra or the off-screen OpenGL library is missing.
    """

    def __init__(
        self,
        task: LiberoTask,
        image_size: int = 128,
        supersampling: int = 1,
        rendering: Literal["fast", "standard"] = "fast",
        seed: int = 0,
    ):
        if image_size < 1 or supersampling < 1:
            raise ValueError(f"image_size and supersampling must be positive, got {image_size} and {supersampling}.")
        if rendering not in ("fast", "standard"):
            raise ValueError(f"rendering must be 'fast' or 'standard', got {rendering!r}.")
        self.task = task
        self.image_size = image_size
        self.supersampling = supersampling
        self.rendering = rendering
        self.seed = seed
        self._render_contexts: dict[int, Any] = {}
        envs = import_simulator("libero.libero.envs.env_wrapper")
        with _seeded(seed):
            # Without a renderer no OpenGL context is made until the first image is asked for.
            self._libero = envs.ControlEnv(
                bddl_file_name=str(task.bddl_file),
                # Joint noise of 0.02 rad, as in the fixed initial states.
                initialization_noise="default",
                use_camera_obs=False,
                has_renderer=False,
                has_offscreen_renderer=False,
                ignore_done=True,
                hard_reset=False,
            )
        # The simulator would otherwise refresh some fifty object sensors in each of 25 physics steps per action.
        for name in self._libero.env.observation_names:
            self._libero.env.modify_observable(observable_name=name, attribute="enabled", modifier=False)

    def __enter__(self) -> "LiberoEnvironment":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the simulation and its OpenGL context."""
        self._render_contexts.clear()
        self._libero.close()

    @property
    def env_arguments(self) -> dict[str, Any]:
        """What recreates this environment in robosuite, without any path of this machine."""
        return {
            "type": 1,
            "env_name": type(self._libero.env).__name__,
            "problem_name": self._libero.problem_name,
            "bddl_file": f"{self.task.suite}/{self.task.bddl_file.name}",
            "env_kwargs": {
                "robots": ["Panda"],
                "controller": "OSC_POSE",
                "control_freq": 20,
                "camera_names": list(SIMULATOR_CAMERAS.values()),
                "camera_heights": self.image_size,
                "camera_widths": self.image_size,
                "hard_reset": False,
                "ignore_done": True,
                "seed": self.seed,
            },
        }

    @property
    def goal(self) -> list[list[str]]:
        """The conjunction of predicates that is success, e.g. `[["in", "milk_1", "basket_1_contain_region"]]`."""
        return self._libero.env.parsed_problem["goal_state"]

    @property
    def state(self) -> np.ndarray:
        """The flattened MuJoCo state (time, qpos, qvel), `(state_dim,)` float64."""
        return self._libero.get_sim_state()

    def reset(
        self, init_state: int | np.ndarray | None = None, seed: int | None = None, settling_steps: int = SETTLING_STEPS
    ) -> None:
        """
        Start an episode.

        Args:
            init_state (`int` or `np.ndarray` of shape `(state_dim,)`, *optional*):
                Index of one of the task's fixed initial states, or a flattened MuJoCo state; without it, objects are
                placed at random.
            seed (`int`, *optional*, defaults to the environment's): Seed of fixture poses and random placements.
            settling_steps (`int`, *optional*, defaults to 10): Idle steps during which objects fall into place.
        """
        state = self._fixed_state(int(init_state)) if isinstance(init_state, int | np.integer) else init_state
        with _seeded(self.seed if seed is None else seed):
            self._libero.reset()
        if state is not None:
            self._set_state(state)
        idle = np.array([0.0] * 6 + [GRIPPER_OPEN])
        for _ in range(settling_steps):
            self.step(idle)

    def restore(self, state: np.ndarray, seed: int | None = None) -> None:
        """
        Start an episode from a recorded state, such as the `init_state` of a demonstration, without settling steps.

        Controller and solver start from rest, so restoring a state and stepping through the recorded actions
        reproduces a demonstration that itself began with `restore`.

        Args:
            state (`np.ndarray` of shape `(state_dim,)`): The flattened MuJoCo state.
            seed (`int`, *optional*, defaults to the environment's): The recorded seed of the fixtures' poses.
        """
        self.reset(init_state=np.asarray(state), seed=seed, settling_steps=0)

    def _fixed_state(self, index: int) -> np.ndarray:
        states = self.task.init_states()
        if not 0 <= index < len(states):
            raise ValueError(f"{self.task.name} has initial states 0 to {len(states) - 1}, not {index}.")
        return states[index]

    def _set_state(self, state: np.ndarray) -> None:
        simulation = self._libero.sim
        expected = 1 + simulation.model.nq + simulation.model.nv
        if state.shape != (expected,):
            raise ValueError(f"A state of {self.task.name} has shape ({expected},), got {state.shape}.")
        simulation.set_state_from_flattened(state)
        simulation.data.qacc_warmstart[:] = 0.0
        simulation.forward()
        robot = self._libero.robots[0]
        robot.controller.update(force=True)
        robot.controller.reset_goal()
        robot.gripper.current_action = np.zeros(robot.gripper.dof)

    def step(self, action: np.ndarray) -> bool:
        """
        Execute one action for a twentieth of a second.

        Args:
            action (`np.ndarray` of shape `(7,)`): Values outside [-1, 1] are clipped by the controller.

        Returns:
            `bool`: Whether the task's goal now holds.
        """
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (ACTION_DIMENSION,) or not np.isfinite(action).all():
            raise ValueError(f"An action is {ACTION_DIMENSION} finite numbers, got {action!r}.")
        self._libero.step(action)
        return self.check_success()

    def check_success(self) -> bool:
        """Whether the task's goal holds now."""
        return bool(self._libero.check_success())

    def proprioception(self) -> dict[str, np.ndarray]:
        """
        The robot's own state under LIBERO's names, float64: `joint_states` (7,) in rad, `gripper_states` (2,) in m,
        `ee_pos` (3,) in m, `ee_ori` (3,) axis-angle in rad, `ee_states` (6,) both together, and `robot_states` (9,):
        gripper, position, quaternion (x, y, z, w).
        """
        transforms = import_simulator("robosuite.utils.transform_utils")
        robot, data = self._libero.robots[0], self._libero.sim.data
        gripper = np.array(data.qpos[robot._ref_gripper_joint_pos_indexes])
        position = np.array(data.site_xpos[robot.eef_site_id])
        quaternion = transforms.convert_quat(data.get_body_xquat(robot.robot_model.eef_name), to="xyzw")
        orientation = transforms.quat2axisangle(quaternion.copy())
        return {
            "joint_states": np.array(data.qpos[robot._ref_joint_pos_indexes]),
            "gripper_states": gripper,
            "ee_pos": position,
            "ee_ori": orientation,
            "ee_states": np.concatenate([position, orientation]),
            "robot_states": np.concatenate([gripper, position, quaternion]),
        }

    def images(self) -> dict[str, np.ndarray]:
        """Both cameras' pictures, `agentview_rgb` and `eye_in_hand_rgb`: upright `(h, w, 3)` uint8."""
        return {name: self.render(camera) for name, camera in SIMULATOR_CAMERAS.items()}

    def render(self, camera: str, size: int | None = None) -> np.ndarray:
        """
        One simulator camera's picture, upright `(size, size, 3)` uint8. Of another `size` than `image_size`, which is
        for people to look at, it is not supersampled.
        """
        side, factor = (self.image_size, self.supersampling) if size is None else (size, 1)
        size = side * factor
        simulation = self._libero.sim
        context = self._context(size)
        context.gl_ctx.make_current()
        context.render(size, size, camera_id=simulation.model.camera_name2id(camera))
        # OpenGL counts rows from the bottom.
        image = context.read_pixels(size, size)[::-1]
        if factor == 1:
            return np.ascontiguousarray(image)
        blocks = image.reshape(side, factor, side, factor, 3).astype(np.float32)
        return np.rint(blocks.mean(axis=(1, 3))).astype(np.uint8)

    def _context(self, size: int) -> Any:
        if size not in self._render_contexts:
            mujoco = import_simulator("mujoco")
            binding = import_simulator("robosuite.utils.binding_utils")
            quality = self._libero.sim.model.vis.quality
            if self.rendering == "fast":
                # Read once, when the context is made.
                quality.offsamples, quality.shadowsize = 0, 1024
            context = binding.MjRenderContextOffscreen(self._libero.sim, device_id=-1, max_width=size, max_height=size)
            # Robosuite's groups: 0 holds collision shapes, 1 what is to be seen.
            context.vopt.geomgroup[0], context.vopt.geomgroup[1] = 0, 1
            if self.rendering == "fast":
                context.scn.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
                context.scn.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
            self._render_contexts[size] = context
        return self._render_contexts[size]

    @property
    def objects(self) -> list[str]:
        """Names of the problem file's objects and fixtures, e.g. `milk_1`."""
        return list(self._libero.env.obj_body_id)

    def bounds(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest world coordinates `((3,), (3,))` in m of an object's collision shapes."""
        body, model, data = self._body(name), self._libero.sim.model._model, self._libero.sim.data._data
        shapes = np.flatnonzero((model.body_rootid[model.geom_bodyid] == body) & (model.geom_group == 0))
        signs = np.stack(np.meshgrid(*[(-1.0, 1.0)] * 3), axis=-1).reshape(8, 3)
        corners = model.geom_aabb[shapes, None, :3] + signs * model.geom_aabb[shapes, None, 3:]
        world = np.einsum("nij,nkj->nki", data.geom_xmat[shapes].reshape(-1, 3, 3), corners)
        world += data.geom_xpos[shapes, None]
        return world.min(axis=(0, 1)), world.max(axis=(0, 1))

    def hand_rotation(self) -> np.ndarray:
        """World rotation matrix `(3, 3)` of the gripper; its first column is the axis along which fingers close."""
        robot = self._libero.robots[0]
        return np.array(self._libero.sim.data.site_xmat[robot.eef_site_id]).reshape(3, 3)

    def _body(self, name: str) -> int:
        bodies = self._libero.env.obj_body_id
        if name not in bodies:
            raise ValueError(f"{self.task.name} has no object {name!r}; it has {', '.join(sorted(bodies))}.")
        return bodies[name]


class _seeded:  # noqa: N801 - used like a function, in `with`
    """LIBERO draws from NumPy's global generator: seed it for a while, then give the caller's stream back."""

    def __init__(self, seed: int):
        self.seed = seed

    def __enter__(self) -> None:
        self.saved = np.random.get_state()
        np.random.seed(self.seed)

    def __exit__(self, *exception: object) -> None:
        np.random.set_state(self.saved)
