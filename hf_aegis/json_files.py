"""JSON as files of this package have it: in UTF-8, each key once, numbers finite, and of bounded depth."""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn


_SHOWN = 80
_DEEPEST = 100


def parse_json(text: str | bytes, where: object, *, finite: bool = True) -> Any:
    """
    The value of a JSON text.

    Args:
        text (`str` or `bytes`): The text, in UTF-8.
        where (`Any`): Where it stands, for messages.
        finite (`bool`, *optional*, defaults to `True`): Whether NaN and infinities are refused.

    Raises:
        ValueError: if it is not UTF-8 or not JSON, names a key twice, nests too deeply, or holds what other
            programs do not read: NaN, a number beyond float64, half of a surrogate pair.
    """
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        value = json.loads(
            decoded,
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant if finite else None,
            parse_float=_finite_float if finite else None,
            parse_int=_bounded_int,
        )
        # Far from where Python itself gives up, which depends on who calls.
        if decoded.count("[") + decoded.count("{") > _DEEPEST:
            _check_depth(value)
        # Half of a surrogate pair is no character, and could not be written again.
        if "\\u" in decoded:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except RecursionError:
        raise ValueError(f"{where}: not JSON: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}; found {text[:_SHOWN]!r}") from error


def parse_json_object(text: str | bytes, where: object, *, finite: bool = True) -> dict[str, Any]:
    """
    The same for a text that holds an object.

    Raises:
        ValueError: as [`parse_json`], and if it holds something else.
    """
    value = parse_json(text, where, finite=finite)
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, found {_shown(value)}")
    return value


def read_json_object(path: str | os.PathLike[str], *, finite: bool = True) -> dict[str, Any]:
    """
    The object in a JSON file.

    Raises:
        OSError: if the file cannot be read.
        ValueError: as [`parse_json_object`]; the file is named.
    """
    return parse_json_object(Path(path).read_bytes(), os.fspath(path), finite=finite)


def require_keys(values: Any, kinds: Mapping[str, type | tuple[type, ...]], where: object) -> dict[str, Any]:
    """
    Checks the types of an object's values; further keys do not matter.

    Args:
        values (`Any`): What should be an object.
        kinds (`Mapping`): Types by key. A key may be missing where `None` may stand for its value, with `type(None)`
            among the types. `float` takes integers too; booleans are no numbers.
        where (`Any`): Where it stands, for messages.

    Returns:
        `dict[str, Any]`: `values`.

    Raises:
        ValueError: if it is no object, or a key is missing or has a value of another type; it is named.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected an object, found {_shown(values)}")
    for key, kind in kinds.items():
        accepted = kind if isinstance(kind, tuple) else (kind,)
        if key not in values and type(None) not in accepted:
            raise ValueError(f"{where}: key {key!r} is missing, found {sorted(values)}")
        if not is_kind(values.get(key), accepted):
            names = " or ".join("null" if one is type(None) else one.__name__ for one in accepted)
            raise ValueError(f"{where}: key {key!r} is {_shown(values[key])}, expected {names}")
    return values


def is_kind(value: Any, kinds: tuple[type, ...]) -> bool:
    """Whether a value parsed from JSON has one of the types, see [`require_keys`]."""
    return type(value) in kinds or (type(value) is int and float in kinds)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice!r} stands there twice")
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:_SHOWN]} is beyond float64")
    return value


def _bounded_int(text: str) -> int:
    # transformers writes 10³⁰ for a length without end.
    if len(text) > 300:
        raise ValueError(f"{text[:_SHOWN]}... is beyond float64")
    return int(text)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_DEEPEST):
        parts = (part for one in level for part in (one.values() if isinstance(one, dict) else one))
        level = [part for part in parts if isinstance(part, dict | list)]
        if not level:
            return
    raise ValueError("nested too deeply")


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, dict | list) else f"{type(value).__name__} of {len(value)}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
