"""Folders whose files are one input together, so that each damage meets what else is there."""

from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping
from pathlib import Path
from random import Random

from fuzz_engine import JSON, JSON_LINES, Mutation, mutate_bytes

from file_readers.safetensors_mutations import SAFETENSORS


_KINDS = {".json": JSON, ".jsonl": JSON_LINES, ".safetensors": SAFETENSORS}


def pack(files: Mapping[str, bytes]) -> bytes:
    """One input of files by their names."""
    return b"\n".join(name.encode() + b" " + b64encode(data) for name, data in files.items())


def unpack(data: bytes, folder: Path, known: Iterable[str]) -> None:
    """Writes those files of an input whose names are known, and removes the others."""
    files = _unpacked(data)
    for name in known:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if name in files:
            path.write_bytes(files[name])


def _unpacked(data: bytes) -> dict[str, bytes]:
    try:
        parts = [line.partition(b" ") for line in data.split(b"\n")]
        return {name.decode(): b64decode(coded) for name, _, coded in parts}
    except ValueError:
        return {}


def _mutate_file(data: bytes, random: Random) -> bytes:
    files = _unpacked(data)
    if not files:
        return data
    name = random.choice(list(files))
    structured = _KINDS.get(Path(name).suffix)
    if random.randrange(20) == 0:
        del files[name]
    elif structured is None or random.randrange(4) == 0:
        files[name] = mutate_bytes(files[name], random)
    else:
        files[name] = random.choice(structured)(files[name], random)
    return pack(files)


FOLDER: tuple[Mutation, ...] = (_mutate_file,)
"""Mutations of one file of such a folder."""
