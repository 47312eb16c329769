"""The wire format: equal to openpi's, and closed to everything that is not plain numbers and text."""

import math
import pickle

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hf_aegis.serving.messages import MessageError, pack, unpack


openpi = pytest.importorskip("openpi_client.msgpack_numpy")

numbers = st.one_of(
    arrays.boolean_dtypes(),
    arrays.integer_dtypes(),
    arrays.unsigned_integer_dtypes(),
    arrays.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
)


@settings(max_examples=60, deadline=None)
@given(arrays.arrays(numbers, arrays.array_shapes(min_dims=0, min_side=0, max_dims=4, max_side=4)))
def test_arrays_pass_both_ways_as_openpi_sends_them(array):
    message = {"observation/image": array, "prompt": "pick up the milk", "nested": {"list": [1, 2.5, None, True]}}
    assert pack(message) == openpi.packb(message)
    read, theirs = unpack(openpi.packb(message)), openpi.unpackb(pack(message))
    for values in (read["observation/image"], theirs["observation/image"]):
        assert values.shape == array.shape
        np.testing.assert_array_equal(values, array)
    assert read["observation/image"].dtype == array.dtype.newbyteorder("=")
    assert read["observation/image"].flags.writeable
    assert read["nested"] == message["nested"]


@pytest.mark.parametrize("scalar", [np.float32(0.5), np.int64(-3), np.bool_(True), np.float64(math.inf)])
def test_scalars_pass_both_ways(scalar):
    read = unpack(openpi.packb({"x": scalar}))["x"]
    assert read == scalar and np.asarray(read).dtype == scalar.dtype
    assert openpi.unpackb(pack({"x": scalar}))["x"] == scalar


def test_text_of_numpy_is_text():
    assert unpack(openpi.packb({"prompt": np.str_("pick up the milk")})) == {"prompt": "pick up the milk"}


def array_map(**changes):
    entries = {"__ndarray__": True, "data": b"\0" * 8, "dtype": "<f4", "shape": [2]} | changes
    return msgpack.packb({key.encode(): value for key, value in entries.items()})


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def scalar_map(**changes):
    entries = {"__npgeneric__": True, "data": 1.0, "dtype": "<f4"} | changes
    return msgpack.packb({key.encode(): value for key, value in entries.items()})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected a msgpack message; these 0 bytes"),
        (b"\xc1", "expected a msgpack message"),
        (b"hello there", "expected a msgpack message"),
        (pack({"a": 1})[:-1], "expected a msgpack message"),
        (pack({"a": 1}) + b"\0", "expected a msgpack message"),
        # An array that announces four thousand million elements, and has none.
        (b"\xdd\xff\xff\xff\xff", "a list or a map of more than 1024 entries"),
        (b"\xdf\xff\xff\xff\xff", "a list or a map of more than 1024 entries"),
        # Text, bytes and an extension that announce as much.
        (b"\xdb\xff\xff\xff\xff", "expected a msgpack message"),
        (b"\xc6\xff\xff\xff\xff", "expected a msgpack message"),
        (b"\xc9\xff\xff\xff\xff\x01", "expected a msgpack message"),
        # A million empty lists in lists take a megabyte here, and eighty as Python's.
        ((b"\xdc\x04\x00" + b"\x90" * 1024) * 1000, "expected a msgpack message"),
        (
            b"\xdc\x03\xe8" + (b"\xdc\x04\x00" + b"\x90" * 1024) * 1000,
            "more than 10000 values besides those of arrays",
        ),
        (
            b"\xdc\x03\xe8" + (b"\xdc\x04\x00" + b"\x00" * 1024) * 1000,
            "more than 10000 values besides those of arrays",
        ),
        (b"\x91" * 100_000 + b"\xc0", "expected a msgpack message"),
        (b"\xa2\xff\xfe", "expected a msgpack message"),
        (msgpack.packb({1: 2}), "expected a msgpack message"),
        (array_map(dtype="|O"), "expected an array of numbers; found one of dtype '|O'"),
        (array_map(dtype="<c8"), "expected an array of numbers"),
        (array_map(dtype="f4,f4"), "expected an array of numbers"),
        (array_map(dtype="<M8[s]"), "expected an array of numbers"),
        (array_map(dtype="|S8"), "expected an array of numbers"),
        (array_map(dtype=4), "expected an array of numbers"),
        (array_map(dtype="x" * 1000), r"found one of dtype 'x+\.\.\."),
        (array_map(shape=[3]), r"shape \(3,\) takes 12 bytes; found 8 bytes"),
        (array_map(shape=[1]), "takes 4 bytes; found 8 bytes"),
        (array_map(shape=[-2]), "expected a list of sizes"),
        (array_map(shape=[2.0]), "expected a list of sizes"),
        (array_map(shape=[True, 2]), "expected a list of sizes"),
        (array_map(shape=2), "expected a list of sizes"),
        (array_map(shape=[1] * 40), "expected a list of sizes"),
        (array_map(shape=[2**24, 2**24]), "takes .* bytes; found 8 bytes"),
        (array_map(data=b"", shape=[0, 2**64 - 1]), "expected a list of sizes"),
        (array_map(dtype=nested(500)), r"found one of dtype \[\[\["),
        (array_map(data="text"), "found str"),
        (msgpack.packb({b"__ndarray__": True}), "expected an array of numbers; found one of dtype None"),
        (scalar_map(dtype="|O"), "expected a number of a plain dtype"),
        (scalar_map(data="one"), "expected a number of a plain dtype; found a str"),
        (scalar_map(data=300, dtype="|u1"), "does not fit its dtype"),
        (scalar_map(data=1e300, dtype="<f2"), "does not fit its dtype"),
        (scalar_map(data="x", dtype="<U99999999999"), "expected a number of a plain dtype"),
    ],
)
def test_refused(data, message):
    with pytest.raises(MessageError, match=message):
        unpack(data)


def test_pickles_are_never_loaded():
    class Bomb:
        def __reduce__(self):
            return pytest.fail, ("unpickled",)

    payload = pickle.dumps(np.array([Bomb()], dtype=object))
    with pytest.raises(MessageError):
        unpack(array_map(dtype="|O", data=payload, shape=[len(payload) // 8]))
    assert unpack(msgpack.packb({"data": payload})) == {"data": payload}


@pytest.mark.parametrize("value", [np.array([object()]), np.array([1j]), np.array(["text"])])
def test_only_numbers_are_sent(value):
    with pytest.raises(ValueError, match="a message cannot hold an array of"):
        pack({"x": value})
    with pytest.raises(TypeError, match="a message cannot hold a set"):
        pack({"x": {1}})


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data):
    try:
        unpack(data)
    except MessageError as error:
        told = str(error)
    else:
        told = ""
    assert len(told) < 300
