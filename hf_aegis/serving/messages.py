"""
Messages of openpi's policy protocol: msgpack, in which an array is a map of its bytes, dtype and shape.

The format is that of `openpi_client.msgpack_numpy`. What comes from the network is read with suspicion: plain numbers
only, no pickles, and an array's bytes have to fit its shape.
"""

import math
import re
from typing import Any

import numpy as np


_ARRAY, _SCALAR = b"__ndarray__", b"__npgeneric__"
_NUMBERS = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")
_TEXT = re.compile(r"[<>|=]?U[0-9]{1,7}")
_MAX_DIMENSIONS = 8

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
        MessageError: The bytes are no msgpack, or an array in them is of objects or does not fit its shape.
    """
    import msgpack

    try:
        return msgpack.unpackb(data, object_hook=_decode)
    except MessageError:
        raise
    # Besides its own exceptions, msgpack raises these of truncated, superfluous and too deeply nested data, of text
    # that is not UTF-8 and of keys that are neither text nor bytes.
    except (msgpack.UnpackException, ValueError, TypeError) as error:
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


def _decode(value: dict[Any, Any]) -> Any:
    if _ARRAY in value:
        return _decode_array(value)
    if _SCALAR in value:
        return _decode_scalar(value)
    return value


def _decode_array(value: dict[Any, Any]) -> np.ndarray:
    data, code, shape = value.get(b"data"), value.get(b"dtype"), value.get(b"shape")
    if not isinstance(code, str) or not _NUMBERS.fullmatch(code):
        raise MessageError(f"expected an array of numbers; found one of dtype {_shown(code)}")
    if (
        not isinstance(shape, list)
        or len(shape) > _MAX_DIMENSIONS
        or not all(type(size) is int and size >= 0 for size in shape)
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
            return np.dtype(code).newbyteorder("=").type(data)
        except (OverflowError, ValueError) as error:
            raise MessageError(f"a number does not fit its dtype {code}") from error
    raise MessageError(f"expected a number of a plain dtype; found a {type(data).__name__} of {_shown(code)}")


def _shown(value: Any) -> str:
    """A short form of what a client sent, for the message back to it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
