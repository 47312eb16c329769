"""Demonstration files in HDF5: bytes of them, and what can be said in a sound HDF5 file that is no demonstration."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import h5py
import numpy as np
from fuzz_engine import Mutation, mutate_value, reading
from PIL import Image

from file_readers.file_reader import FileReader
from hf_aegis.data import LiberoDataset
from hf_aegis.data.libero_inspect import format_report, inspect_file
from hf_aegis.data.libero_pictures import pictures_of


_SIDE = 4
_TYPES: tuple[Any, ...] = (
    *("f8", "f4", "i8", "u1", "S5", "?", "f2", "c16", h5py.vlen_dtype(np.uint8), h5py.string_dtype()),
    *(h5py.ref_dtype, [("a", "f8"), ("b", "i4")], h5py.vlen_dtype(np.float64), h5py.enum_dtype({"A": 1}), "(3,)f4"),
    h5py.opaque_dtype(np.dtype("M8[s]")),
)
_VALUES: tuple[Any, ...] = (
    *(0, -1, 3, 2**62, 1.5, "text", "{}", "[]", b"\xff\xfe", "opencv", np.zeros(3), np.zeros((2, 2), "u1"), True),
    *(h5py.Empty("f4"), np.array(["a", "b"], dtype=object), "{" * 2000, "9" * 5000, np.uint64(2**64 - 1)),
)


def _demonstration(group: h5py.Group, length: int, jpeg: bool) -> None:
    random = np.random.default_rng(length)
    group.attrs["num_samples"] = length
    group["actions"] = random.uniform(-1, 1, (length, 7))
    group["states"] = np.zeros((length, 3))
    group.create_group("obs")
    group["obs"].create_dataset("joint_states", data=random.normal(size=(length, 7)), compression="gzip")
    group["obs"]["gripper_states"] = np.zeros((length, 2))
    for camera in ("agentview_rgb", "eye_in_hand_rgb"):
        frames = random.integers(0, 255, (length, _SIDE, _SIDE, 3), dtype=np.uint8)
        if not jpeg:
            group["obs"].create_dataset(camera, data=frames, chunks=(1, _SIDE, _SIDE, 3), compression="gzip")
            continue
        streams = group["obs"].create_dataset(f"{camera}_jpeg", (length,), h5py.vlen_dtype(np.uint8))
        for step, frame in enumerate(frames):
            stream = io.BytesIO()
            Image.fromarray(frame).save(stream, format="JPEG")
            streams[step] = np.frombuffer(stream.getvalue(), np.uint8)


def _file(jpeg: bool, libver: str | tuple[str, str]) -> bytes:
    memory = io.BytesIO()
    with h5py.File(memory, "w", libver=libver) as file:
        data = file.create_group("data" if not jpeg else "libero_object/pick_up/data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": "pick up the milk"})
        data.attrs["macros_image_convention"] = "opengl"
        data.attrs["num_demos"], data.attrs["total"] = 1, 2
        if jpeg:
            convention = {"observation": "before_action", "image_origin": "top_left", "image_size": _SIDE}
            data.attrs["hf_aegis_convention"] = json.dumps({"format_version": 1, "frames": "jpeg", **convention})
            settings = {"image_size": _SIDE, "supersampling": 1, "rendering": "fast"}
            data.attrs["hf_aegis_recording"] = json.dumps({"settings": settings, "attempts": 3})
        _demonstration(data.create_group("demo_0"), 2, jpeg)
    return memory.getvalue()


def _places(file: h5py.File) -> list[str]:
    found: list[str] = []
    file.visit(found.append)
    return found


def _change(file: h5py.File, random: Random) -> None:
    places = _places(file)
    place = random.choice(places)
    above, _, name = place.rpartition("/")
    parent = file[above] if above else file
    kind = random.randrange(13)
    if kind == 0:
        del parent[name]
    elif kind == 1:
        parent.move(name, random.choice((name + "x", "data", "demo_7", "obs", "demo_99999999999999999999", "é")))
    elif kind <= 4:
        holder = file[random.choice([one for one in places if len(file[one].attrs)])]
        _change_attribute(holder, random)
    elif kind <= 8 and isinstance(parent[name], h5py.Dataset):
        _replace_dataset(parent, name, random)
    else:
        if name in parent and random.randrange(2):
            del parent[name]
        _add_link(file, parent, f"{name}{random.choice(('', 'x'))}", random)


def _change_attribute(holder: Any, random: Random) -> None:
    key = random.choice(list(holder.attrs))
    value = holder.attrs[key]
    if isinstance(value, str) and value.startswith("{") and random.randrange(3):
        holder.attrs[key] = json.dumps(mutate_value(json.loads(value), random))
    elif random.randrange(4) == 0:
        del holder.attrs[key]
    else:
        holder.attrs[key] = random.choice(_VALUES)


def _replace_dataset(parent: h5py.Group, name: str, random: Random) -> None:
    old = parent[name]
    shape, dtype = old.shape, old.dtype
    del parent[name]
    sides = (0, 1, 2, 3, 7, 2**20, 2**40)
    kind = random.randrange(6)
    if kind == 0:
        parent.create_dataset(name, shape, random.choice(_TYPES))
    elif kind == 1:
        shape = tuple(random.choice((side, side, random.choice(sides))) for side in shape)
        parent.create_dataset(name, shape, dtype, chunks=tuple(max(1, min(side, 64)) for side in shape))
    elif kind == 2:
        parent.create_dataset(name, random.choice(((), (3,), (3, 7, 1), (2**40, 7), (0, 7))), dtype)
    elif kind == 3:
        parent.create_dataset(name, data=h5py.Empty(dtype))
    elif kind == 4:
        parent.create_dataset(name, (3, 2**13, 2**13), dtype, chunks=(1, 2**13, 2**13), compression="gzip")
    else:
        values = np.full(shape, random.choice((np.nan, np.inf, 1e300, -1.0)))
        parent.create_dataset(name, data=values)


def _add_link(file: h5py.File, parent: h5py.Group, name: str, random: Random) -> None:
    if name in parent:
        return
    targets: tuple[Callable[[], Any], ...] = (
        lambda: h5py.SoftLink("/"),
        lambda: h5py.SoftLink(f"{parent.name}/{name}"),
        lambda: h5py.ExternalLink("/etc/passwd", "/data"),
        lambda: h5py.ExternalLink("other.hdf5", "/data"),
        lambda: file["/"],
        lambda: parent,
        lambda: file[random.choice(_places(file))],
    )
    kind = random.randrange(len(targets) + 2)
    if kind < len(targets):
        parent[name] = targets[kind]()
    elif kind == len(targets):
        parent.create_dataset(name, (3, 7), "f8", external=[("/etc/passwd", 0, 168)])
    else:
        layout = h5py.VirtualLayout((3, 7), "f8")
        layout[:] = h5py.VirtualSource("other.hdf5", "a", (3, 7))
        parent.create_virtual_dataset(name, layout)


def _structured(seeds: list[bytes]) -> Mutation:
    """Of sound files only: HDF5 itself may crash on those that are damaged already, in the process that makes them."""

    def mutation(data: bytes, random: Random) -> bytes:
        memory = io.BytesIO(random.choice(seeds))
        with h5py.File(memory, "r+") as file:
            for _ in range(random.choice((1, 1, 2, 3))):
                try:
                    _change(file, random)
                # What HDF5 does not let be done is not done.
                except (KeyError, OSError, RuntimeError, TypeError, ValueError, IndexError):
                    continue
        return memory.getvalue()

    return mutation


def demonstrations(folder: Path) -> FileReader:
    seeds = [_file(jpeg, libver) for jpeg in (False, True) for libver in ("earliest", ("v110", "v114"))]

    def read(path: Path) -> Any:
        # It collects problems rather than raise them.
        format_report(inspect_file(path))
        pictures_of(path)
        dataset = LiberoDataset(path, chunk_size=2, short_demonstrations="pad")
        return [dataset[0], dataset[-1]]

    return FileReader(seeds, reading(folder / "demo.hdf5", read), "demo.hdf5", (_structured(seeds),))


DEMONSTRATION_READERS = {"demonstrations": demonstrations}
