"""Writes demonstrations in LIBERO's HDF5 format."""

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image

from hf_aegis.atomic_files import replacing
from hf_aegis.data.libero_format import CAMERAS, CONVENTION_ATTRIBUTE, JPEG_SUFFIX, LiberoConvention


@dataclass
class Episode:
    """
    One recorded demonstration of `T` steps; row `t` of everything but `success` is from before action `t`.

    Args:
        actions (`np.ndarray` of shape `(T, 7)`): Translation, rotation, gripper, in [-1, 1].
        states (`np.ndarray` of shape `(T, state_dim)`): Flattened MuJoCo states.
        success (`np.ndarray` of shape `(T,)`, bool): Whether the task's goal held after the action.
        proprioception (`Mapping[str, np.ndarray]`): LIBERO's names to `(T, width)`, with `robot_states`.
        images (`Mapping[str, np.ndarray]`): Cameras to upright frames `(T, s, s, 3)`, uint8.
        reset_seed (`int`): Seed of the fixtures' poses, with which the first state is to be restored.
    """

    actions: np.ndarray
    states: np.ndarray
    success: np.ndarray
    proprioception: Mapping[str, np.ndarray]
    images: Mapping[str, np.ndarray]
    reset_seed: int


def encode_jpeg(frame: np.ndarray, quality: int) -> np.ndarray:
    """One upright RGB frame `(s, s, 3)` as the bytes of a JPEG file, uint8 `(n,)`."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="JPEG", quality=quality, optimize=True)
    return np.frombuffer(buffer.getvalue(), dtype=np.uint8)


def write_episode(
    group: h5py.Group,
    episode: Episode,
    convention: LiberoConvention,
    jpeg_quality: int = 90,
    store_states: bool = True,
) -> None:
    """
    Write one demonstration.

    The attribute `model_file`, in released files a MuJoCo XML, is empty: that XML names mesh and texture files by
    absolute paths, which mean nothing elsewhere. The scene comes back from the task's name and `reset_seed`, and the
    start from `init_state`: see [`LiberoEnvironment.restore`].

    Args:
        group (`h5py.Group`): An empty group, the future `demo_<i>`.
        episode ([`Episode`]): What was recorded.
        convention ([`LiberoConvention`]): Raw frames or JPEG streams.
        jpeg_quality (`int`, *optional*, defaults to 90): Quality of JPEG streams.
        store_states (`bool`, *optional*, defaults to `True`):
            Whether to write `states`, a quarter of a small file; a replay needs only the attribute `init_state`.
    """
    length = len(episode.actions)
    group.attrs["num_samples"] = length
    group.attrs["model_file"] = ""
    group.attrs["init_state"] = episode.states[0]
    group.attrs["reset_seed"] = episode.reset_seed
    packed = {"compression": "gzip", "compression_opts": 9, "shuffle": True}
    group.create_dataset("actions", data=episode.actions.astype(np.float64), **packed)
    if store_states:
        group.create_dataset("states", data=episode.states.astype(np.float64), **packed)
    group.create_dataset("robot_states", data=episode.proprioception["robot_states"].astype(np.float64), **packed)
    last = np.zeros(length, dtype=np.uint8)
    last[-1] = 1
    group.create_dataset("rewards", data=episode.success.astype(np.uint8))
    group.create_dataset("dones", data=last)
    observations = group.create_group("obs")
    for name, values in episode.proprioception.items():
        if name != "robot_states":
            observations.create_dataset(name, data=values.astype(np.float64), **packed)
    for camera in CAMERAS:
        frames = episode.images[camera]
        if convention.frames == "raw":
            observations.create_dataset(
                camera, data=frames, chunks=(1, *frames.shape[1:]), compression="gzip", compression_opts=4
            )
        else:
            streams = observations.create_dataset(camera + JPEG_SUFFIX, (length,), dtype=h5py.vlen_dtype(np.uint8))
            for step, frame in enumerate(frames):
                streams[step] = encode_jpeg(frame, jpeg_quality)


def write_task(
    path: Path, demonstrations: Iterable[tuple[Path, str]], attributes: Mapping[str, Any], convention: LiberoConvention
) -> None:
    """
    Assemble a task's file from demonstrations in other files.

    Args:
        path (`Path`): The file to write; it appears complete or not at all.
        demonstrations (iterable of `(file, group)`): Where the demonstrations lie, in order.
        attributes (`Mapping`): Attributes of the `data` group; mappings become JSON.
        convention ([`LiberoConvention`]): How frames and observations are stored.
    """
    with replacing_hdf5(path) as file:
        data = file.create_group("data")
        total = count = 0
        for source, name in demonstrations:
            with h5py.File(source, "r") as stored:
                stored.copy(stored[name], data, name=f"demo_{count}")
            total += int(data[f"demo_{count}"].attrs["num_samples"])
            count += 1
        data.attrs["num_demos"] = count
        data.attrs["total"] = total
        data.attrs[CONVENTION_ATTRIBUTE] = convention.to_json()
        for key, value in attributes.items():
            data.attrs[key] = json.dumps(value) if isinstance(value, Mapping) else value


@contextmanager
def replacing_hdf5(path: Path, **options: Any) -> Iterator[h5py.File]:
    """
    A new HDF5 file that takes its place under `path`, whose folder is created where it is missing, only when it has
    been written to the end; `options` are those of `h5py.File`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as staged, h5py.File(staged, "w", **options) as file:
        yield file
