"""Seeded mutations of bytes, and of what is parsed from them."""

import copy
import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any


Mutation = Callable[[bytes, Random], bytes]
"""Gives a changed input. What it cannot parse it gives back as it is."""

# Where bytes are put in: numbers at the borders of their types, and what parsers treat apart.
_TOKENS = (
    *(
        number.to_bytes(width, "little")
        for width in (4, 8)
        for number in (0, 1, 2 ** (8 * width - 1), 2 ** (8 * width) - 1)
    ),
    *(b"-1", b"0", b"1e999", b"NaN", b"-Infinity", b"null", b"true", b"99999999999999999999", b"0.1"),
    *(
        b"\x00",
        b"\xff",
        b"\xed\xa0\x80",
        b"\xe2\x80\xa8",
        b"\r\n",
        b'"',
        b"{",
        b"}",
        b"[",
        b"]",
        b":",
        b",",
        b"\\",
        b"../",
    ),
    *(b"&a ", b"*a", b"<<: ", b"!!python/name:os.system ", b"- ", b": ", b"#", b"\\ud800"),
)
_MOST_PLACES = 5000
# In place of any parsed value.
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "a", "\x00", "\ud800", "../../etc/passwd", "/etc/passwd", "é" * 40, "9" * 5000, "1e-5", "nan"),
    *([], {}, [None], [[]], {"": None}, [1, "a", None], {"a": {"b": []}}),
)


def mutate_bytes(data: bytes, random: Random, others: Sequence[bytes] = ()) -> bytes:
    """One to four of: bits flipped, a cut end, a block left out, doubled, overwritten or put in, or another's tail."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        start = random.randrange(len(changed) + 1)
        length = min(random.choice((1, 1, 2, 4, 8, 64, 1024)), len(changed) - start)
        kind = random.randrange(8)
        if kind <= 1 and start < len(changed):
            changed[start] ^= 1 << random.randrange(8)
        elif kind == 2:
            del changed[start:]
        elif kind == 3:
            del changed[start : start + length]
        elif kind == 4:
            changed[start:start] = changed[start : start + length] * random.choice((1, 1, 2, 200))
        elif kind == 5:
            changed[start:start] = random.choice(_TOKENS)
        elif kind == 6:
            token = random.choice(_TOKENS)
            changed[start : start + len(token)] = token
        elif others:
            other = random.choice(others)
            changed[start:] = other[random.randrange(len(other) + 1) :]
    return bytes(changed)


def mutate_value(value: Any, random: Random) -> Any:
    """A parsed value with one place in it changed: replaced, left out, renamed, repeated or wrapped many times."""
    places = _places(value)
    if not places or random.random() < 0.05:
        return _other(value, random)
    container, key = random.choice(places)
    kind = random.randrange(8)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, dict):
        container[random.choice(("", "a", "format_version", str(key) + " ", str(key).upper()))] = container.pop(key)
    elif kind == 1:
        container.insert(key, container[key])
    elif kind == 2:
        other, place = random.choice(places)
        # A copy: a value within itself is no tree.
        container[key] = copy.deepcopy(other[place])
    else:
        container[key] = _other(container[key], random)
    return value


def _other(value: Any, random: Random) -> Any:
    kind = random.randrange(6)
    if kind == 0 and type(value) in (int, float):
        return value * random.choice((-1, 2, 1000, 10**12)) + random.choice((0, 1, -1))
    if kind == 1 and isinstance(value, str):
        return random.choice((value + "x", value[:-1], value.upper(), value * 100, f"../{value}", f"{value}\x00"))
    if kind == 2:
        return random.choice(([value], {"a": value}, str(value), [value] * 10))
    if kind == 3 and random.random() < 0.2:
        for _ in range(random.choice((10, 200))):
            value = [value]
        return value
    return random.choice(_VALUES)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container and key in a tree, up to some thousands: what repeats itself grows without end."""
    found: list[tuple[Any, Any]] = []
    pending = [value]
    while pending and len(found) < _MOST_PLACES:
        container = pending.pop()
        keys = (
            list(container)
            if isinstance(container, dict)
            else range(len(container))
            if isinstance(container, list)
            else ()
        )
        found += [(container, key) for key in keys]
        pending += [container[key] for key in keys]
    return found


def _mutate_json(data: bytes, random: Random) -> bytes:
    try:
        value = json.loads(data)
        for _ in range(random.choice((1, 1, 2))):
            value = mutate_value(value, random)
        return json.dumps(value).encode()
    except (ValueError, RecursionError):
        return data


def _mutate_json_text(data: bytes, random: Random) -> bytes:
    """What JSON text can say that a parsed value cannot: keys twice, and nesting deeper than any parser's stack."""
    place = data.find(random.choice((b"{", b"[", b":", b",")), random.randrange(len(data) + 1)) + 1
    depth = random.choice((5, 2000, 100_000))
    added = random.choice(
        (b'"a": 1, "a": 2, ', b"[" * depth, b"[" * depth + b"]" * depth, b'{"a":' * depth, b"9" * depth, b"1e9999, ")
    )
    return data[:place] + added + data[place:]


def _mutate_json_line(data: bytes, random: Random) -> bytes:
    lines = data.split(b"\n")
    number = random.randrange(len(lines))
    kind = random.randrange(8)
    if kind == 0:
        del lines[number]
    elif kind == 1:
        lines.insert(number, random.choice(lines))
    elif kind == 2:
        lines[number] = random.choice((b"", b"null", b"[]", b"{}", b"3", b"\xff", b" "))
    else:
        lines[number] = _mutate_json(lines[number], random)
    return b"\n".join(lines)


JSON: tuple[Mutation, ...] = (_mutate_json, _mutate_json, _mutate_json, _mutate_json_text)
"""Mutations of a JSON document."""
JSON_LINES: tuple[Mutation, ...] = (_mutate_json_line, _mutate_json_line, _mutate_json_line, _mutate_json_text)
"""Mutations of a file of JSON lines."""
