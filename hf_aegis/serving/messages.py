"""
Messages of openpi's policy protocol: msgpack, in which an array is a map of its bytes, dtype and shape.

The format is that of `openpi_client.msgpack_numpy`. What comes from the network is read with suspicion: plain numbers
only, no pickles, an array's bytes have to fit its shape, and besides arrays there are no more values than an
observation needs: a byte of msgpack can be an object of Python that takes a hundred.
"""

import math
import re
import reprlib
from typing import Any

import numpy as np


_ARRAY, _SCALAR = b"__ndarray__", b"__npgeneric__"
_NUMBERS = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")
_TEXT = re.compile(r"[<>|=]?U[0-9]{1,7}")
_MAX_DIMENSIONS = 8
_MAX_SIDE = 2**24

MAX_LENGTH = 1024
"""Entries of a list, or of a map."""
MAX_VALUES = 10_000
"""Entries of all lists and maps of a message together; those of arrays do not count."""

INSTALL_HINT = 'the policy server needs optional dependencies: pip install "hf-aegis[serve]"'


class MessageError(ValueError):
    """A message that cannot be read, or does not hold what it should; its text is meant for the client."""


def pack(message: dict[str, Any]) -> bytes:
    """
    Writes a message.

    Args:
        message (`dict`): Of strings, numbers, booleans, `None`, lists, dictionaries and arrays of numbers.

    Raises:
        TypeError: Of other types.
        ValueError: Of an array whose elements are no numbers.
    """
    import msgpack

    return msgpack.packb(message, default=_encode)


def unpack(data: bytes) -> Any:
    """
    Reads a message. Arrays are writable and in the machine's byte order.

    Args:
        data (`bytes`): What [`pack`] or an openpi client wrote.

    Raises:
        MessageError: The bytes are no msgpack, hold more values than [`MAX_LENGTH`] and [`MAX_VALUES`] allow, or an
            array in them is of objects or does not fit its shape.
    """
    import msgpack

    reader = _Reader()
    try:
        return msgpack.unpackb(
            data,
            object_hook=reader.read_map,
            list_hook=reader.read_list,
            max_array_len=MAX_LENGTH,
            max_map_len=MAX_LENGTH,
            max_ext_len=0,
        )
    except MessageError:
        raise
    # Besides its own exceptions, msgpack raises these of truncated, superfluous and too deeply nested data, of text
    # that is not UTF-8 and of keys that are neither text nor bytes.
    except (msgpack.UnpackException, ValueError, TypeError) as error:
        if re.search("max_(array|map)_len", str(error)):
            raise MessageError(f"the message holds a list or a map of more than {MAX_LENGTH} entries") from error
        raise MessageError(
            f"expected a msgpack message; these {len(data)} bytes are none ({type(error).__name__})"
        ) from error


def _encode(value: Any) -> dict[bytes, Any]:
    if not isinstance(value, np.ndarray | np.generic):
        raise TypeError(f"a message cannot hold a {type(value).__name__}")
    if not _NUMBERS.fullmatch(value.dtype.str):
        raise ValueError(f"a message cannot hold an array of {value.dtype}")
    if isinstance(value, np.ndarray):
        return {_ARRAY: True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    return {_SCALAR: True, b"data": value.item(), b"dtype": value.dtype.str}


class _Reader:
    """Counts the values of one message while msgpack builds them, innermost first."""

    def __init__(self) -> None:
        self.values = 0

    def read_list(self, value: list[Any]) -> list[Any]:
        self._count(value)
        return value

    def read_map(self, value: dict[Any, Any]) -> Any:
        self._count(value)
        if _ARRAY in value:
            return _decode_array(value)
        if _SCALAR in value:
            return _decode_scalar(value)
        return value

    def _count(self, value: list[Any] | dict[Any, Any]) -> None:
        # An empty one is a value, too.
        self.values += len(value) + 1
        if self.values > MAX_VALUES:
            raise MessageError(f"the message holds more than {MAX_VALUES} values besides those of arrays")


def _decode_array(value: dict[Any, Any]) -> np.ndarray:
    data, code, shape = value.get(b"data"), value.get(b"dtype"), value.get(b"shape")
    if not isinstance(code, str) or not _NUMBERS.fullmatch(code):
        raise MessageError(f"expected an array of numbers; found one of dtype {_shown(code)}")
    if (
        not isinstance(shape, list)
        or len(shape) > _MAX_DIMENSIONS
        or not all(type(size) is int and 0 <= size <= _MAX_SIDE for size in shape)
    ):
        raise MessageError(f"the shape of an array is {_shown(shape)}; expected a list of sizes")
    dtype = np.dtype(code)
    expected = math.prod(shape) * dtype.itemsize
    if not isinstance(data, bytes) or len(data) != expected:
        found = f"{len(data)} bytes" if isinstance(data, bytes) else type(data).__name__
        raise MessageError(f"an array of {code} and shape {tuple(shape)} takes {expected} bytes; found {found}")
    # A copy: what msgpack gives is read-only.
    return np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="))


def _decode_scalar(value: dict[Any, Any]) -> Any:
    data, code = value.get(b"data"), value.get(b"dtype")
    if isinstance(code, str) and _TEXT.fullmatch(code) and isinstance(data, str):
        return data
    if isinstance(code, str) and _NUMBERS.fullmatch(code) and isinstance(data, bool | int | float):
        try:
            with np.errstate(over="raise"):
                return np.dtype(code).newbyteorder("=").type(data)
        except (ArithmeticError, ValueError) as error:
            raise MessageError(f"a number does not fit its dtype {code}") from error
    raise MessageError(f"expected a number of a plain dtype; found a {type(data).__name__} of {_shown(code)}")


def _shown(value: Any) -> str:
    """A short form of what a client sent, for the message back to it: a nest of a thousand lists is not followed."""
    text = reprlib.repr(value[:60] if isinstance(value, str | bytes) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."
