"""Small LIBERO files with known contents: released-style and recorded-style."""

import io
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image


SIZE = 8


def _frames(length: int, camera: int, demonstration: int) -> np.ndarray:
    """Upright frames: the top half's colour tells step, camera and demonstration; the bottom half is black."""
    frames = np.zeros((length, SIZE, SIZE, 3), np.uint8)
    frames[:, : SIZE // 2, :, 0] = 40 + np.arange(length)[:, None, None]
    frames[:, : SIZE // 2, :, 1] = 100 + 50 * camera
    frames[:, : SIZE // 2, :, 2] = 60 + 10 * demonstration
    return frames


def _encode(frame: np.ndarray) -> np.ndarray:
    stream = io.BytesIO()
    Image.fromarray(frame).save(stream, format="JPEG", quality=100, subsampling=0)
    return np.frombuffer(stream.getvalue(), np.uint8)


class LiberoFileBuilder:
    """Writes demonstration files under a folder; every array of a demonstration is derived from its seed."""

    def __init__(self, folder: Path):
        self.folder = folder

    def arrays(self, seed: int, length: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng(seed)
        return {
            "actions": np.concatenate(
                [random.uniform(-0.9, 0.9, (length, 6)), random.choice([-1.0, 1.0], (length, 1))], axis=1
            ),
            "joint_states": random.normal(0, 0.5, (length, 7)),
            "gripper_states": random.uniform(0, 0.04, (length, 2)) * [1, -1],
        }

    def write(
        self,
        name: str = "libero_object/pick_up_the_milk_demo.hdf5",
        lengths: tuple[int, ...] = (6, 7, 9),
        kind: str = "released",
        instruction: str = "pick up the milk",
        seed: int = 0,
    ) -> Path:
        """One task file; `kind` is `"released"`, `"recorded"` (raw frames) or `"recorded_jpeg"`."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            data = file.create_group("data")
            data.attrs["env_name"] = "Libero_Floor_Manipulation"
            data.attrs["env_args"] = json.dumps({"env_name": "Libero_Floor_Manipulation"})
            data.attrs["problem_info"] = json.dumps({"language_instruction": instruction, "domain_name": "robosuite"})
            data.attrs["macros_image_convention"] = "opengl"
            data.attrs["bddl_file_name"] = f"bddl_files/{path.parent.name}/{path.stem}.bddl"
            data.attrs["num_demos"] = len(lengths)
            data.attrs["total"] = sum(lengths)
            if kind != "released":
                data.attrs["hf_aegis_convention"] = json.dumps(
                    {
                        "format_version": 1,
                        "observation": "before_action",
                        "image_origin": "top_left",
                        "image_size": SIZE,
                        "frames": "jpeg" if kind == "recorded_jpeg" else "raw",
                    }
                )
            for index, length in enumerate(lengths):
                self._demonstration(data.create_group(f"demo_{index}"), seed + index, index, length, kind)
        return path

    def _demonstration(self, group: h5py.Group, seed: int, index: int, length: int, kind: str) -> None:
        arrays = self.arrays(seed, length)
        group.attrs["num_samples"] = length
        group.attrs["model_file"] = "<mujoco/>"
        group.attrs["init_state"] = np.zeros(5)
        group["actions"] = arrays["actions"]
        group["states"] = np.zeros((length, 5))
        group["robot_states"] = np.zeros((length, 9))
        group["rewards"] = np.zeros(length, np.uint8)
        group["dones"] = np.zeros(length, np.uint8)
        observations = group.create_group("obs")
        for key in ("joint_states", "gripper_states"):
            observations[key] = arrays[key]
        observations["ee_states"] = np.zeros((length, 6))
        for camera, key in enumerate(("agentview_rgb", "eye_in_hand_rgb")):
            frames = _frames(length, camera, index)
            if kind == "recorded_jpeg":
                streams = observations.create_dataset(f"{key}_jpeg", (length,), h5py.vlen_dtype(np.uint8))
                for step, frame in enumerate(frames):
                    streams[step] = _encode(frame)
            else:
                observations[key] = frames[:, ::-1] if kind == "released" else frames


@pytest.fixture
def libero_files(tmp_path: Path) -> LiberoFileBuilder:
    return LiberoFileBuilder(tmp_path)
