"""Mutations of what a safetensors file says of its tensors, and of itself."""

import json
from collections.abc import Callable
from random import Random
from typing import Any

from fuzz_engine import Mutation, mutate_value


_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I8", "U8", "BOOL", "C64", "F4", "")
_SIZES = (0, 1, 2, 3, 2**31, 2**40, 2**63, 2**64 - 1, -1)


def _split(data: bytes) -> tuple[dict[str, Any], bytes] | None:
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError):
        return None
    return (header, data[8 + length :]) if isinstance(header, dict) else None


def _joined(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def _of_header(change: Callable[[dict[str, Any], Random], None]) -> Mutation:
    def mutation(data: bytes, random: Random) -> bytes:
        parts = _split(data)
        if parts is None:
            return data
        try:
            change(parts[0], random)
            return _joined(*parts)
        except (ValueError, RecursionError):
            return data

    return mutation


def _tensors(header: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for name, entry in header.items() if name != "__metadata__" and isinstance(entry, dict)]


def _change_dtype(header: dict[str, Any], random: Random) -> None:
    if tensors := _tensors(header):
        random.choice(tensors)["dtype"] = random.choice(_DTYPES)


def _change_shape(header: dict[str, Any], random: Random) -> None:
    if tensors := _tensors(header):
        entry = random.choice(tensors)
        shape = list(entry.get("shape", [])) if isinstance(entry.get("shape"), list) else []
        kind = random.randrange(4)
        if kind == 0 and shape:
            shape[random.randrange(len(shape))] = random.choice(_SIZES)
        elif kind == 1:
            shape.append(random.choice((1, *_SIZES)))
        elif kind == 2:
            shape = shape[::-1]
        else:
            # As many numbers, so that the header stays sound.
            total = 1
            for side in shape:
                total *= side if isinstance(side, int) else 1
            shape = random.choice(([total], [total, 1], [1, total], [1, 1, total], []))
        entry["shape"] = shape


def _change_offsets(header: dict[str, Any], random: Random) -> None:
    if tensors := _tensors(header):
        other = random.choice(tensors).get("data_offsets", [0, 0])
        random.choice(tensors)["data_offsets"] = random.choice((other, [0, 0], [0, 2**63], [4, 0], [-1, 4]))


def _rename(header: dict[str, Any], random: Random) -> None:
    if names := list(header):
        name = random.choice(names)
        others = (name + "x", "", "mean", "\x00", "__metadata__", random.choice(names))
        header[random.choice(others)] = header.pop(name)


def _change_metadata(header: dict[str, Any], random: Random) -> None:
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or not metadata:
        header["__metadata__"] = {"format": "pt"}
        return
    key = random.choice(list(metadata))
    try:
        metadata[key] = json.dumps(mutate_value(json.loads(metadata[key]), random))
    except (TypeError, ValueError, RecursionError):
        metadata[key] = random.choice(("", "x", "-1", "9" * 30, "{", "1e5"))


def _change_numbers(data: bytes, random: Random) -> bytes:
    """NaN, infinities and extremes in the place of numbers."""
    length = 8 + int.from_bytes(data[:8], "little")
    places = (len(data) - length) // 4
    if places <= 0 or places > 2**20:
        return data
    start = length + 4 * random.randrange(places)
    value = random.choice(("0000c07f", "0000807f", "000080ff", "ffff7f7f", "000000bf", "00000000"))
    return data[:start] + bytes.fromhex(value) + data[start + 4 :]


def _change_length(data: bytes, random: Random) -> bytes:
    return random.choice(_SIZES[:-1]).to_bytes(8, "little", signed=False) + data[8:]


def _any_value(header: dict[str, Any], random: Random) -> None:
    mutate_value(header, random)


SAFETENSORS: tuple[Mutation, ...] = (
    *map(_of_header, (_change_dtype, _change_shape, _change_offsets, _rename, _change_metadata, _change_metadata)),
    *(_of_header(_any_value), _change_numbers, _change_numbers, _change_length),
)
"""Mutations of a safetensors file."""
