"""JSON that Python's parser takes and a file of this package never has is refused by name."""

import json
import time
from pathlib import Path

import pytest

from hf_aegis.format_version import NEWEST_VERSIONS, check_format_version, written_version
from hf_aegis.json_files import parse_json, parse_json_object, read_json_object, require_keys


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting"),
        (b"\xff", "can't decode"),
        ('{"a": 1, "b": {"c": 1, "c": 1}}', "'c' stands there twice"),
        ("[" * 101 + "]" * 101, "nested too deeply"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("[NaN]", "NaN is no JSON number"),
        ("[-Infinity]", "-Infinity is no JSON number"),
        ("[1e999]", "beyond float64"),
        ("9" * 5000, r"999\.\.\. is beyond float64"),
        (r'["\ud800"]', "surrogates not allowed"),
    ],
)
def test_what_is_no_json_is_refused_by_name(text: str | bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"^file.json: not JSON: .*{reason}") as caught:
        parse_json(text, "file.json")
    assert type(caught.value) is ValueError
    assert len(str(caught.value)) < 400


def test_a_key_that_stands_there_twice_among_very_many_is_found_in_one_pass() -> None:
    keys = [*range(10**5), 99_999]
    start = time.process_time()
    with pytest.raises(ValueError, match=r"the key 'k99999' stands there twice"):
        parse_json("{" + ",".join(f'"k{key}":0' for key in keys) + "}", "file.json")
    # Every key against every other took minutes.
    assert time.process_time() - start < 5


def test_an_object_is_read(tmp_path: Path) -> None:
    values = {"a": [1.5, 10**30, None, "é", "\U0001f916"], "b": json.loads("[" * 99 + "]" * 99)}
    (tmp_path / "a.json").write_text(json.dumps(values))
    assert read_json_object(tmp_path / "a.json") == values
    with pytest.raises(ValueError, match=r"^there: expected a JSON object, found list of 3"):
        parse_json_object("[1, 2, 3]", "there")


def test_missing_and_mistyped_keys_are_named() -> None:
    kinds = {"a": float, "b": (str, type(None))}
    assert require_keys({"a": 1}, kinds, "there") == {"a": 1}
    for values, reason in (
        ([], "expected an object, found list of 0"),
        ({"b": "x"}, r"key 'a' is missing, found \['b'\]"),
        ({"a": True}, "key 'a' is True, expected float"),
        ({"a": 0.5, "b": {}}, "key 'b' is dict of 0, expected str or null"),
    ):
        with pytest.raises(ValueError, match=rf"^there: {reason}"):
            require_keys(values, kinds, "there")


@pytest.mark.parametrize(("kind", "newest"), NEWEST_VERSIONS.items())
def test_a_format_version_of_the_future_is_refused_with_both_versions(kind: str, newest: int) -> None:
    assert check_format_version({}, kind, "file") == check_format_version({"format_version": 1}, kind, "file") == 1
    assert check_format_version(written_version(kind), kind, "file") == newest
    future = rf"^file: key 'format_version' is {newest + 1} \({kind}\), .* reads 1 to {newest}; a newer file needs"
    with pytest.raises(ValueError, match=future):
        check_format_version({"format_version": newest + 1}, kind, "file")
    for wrong in (0, -1, True, 1.0, "1", None, []):
        with pytest.raises(
            ValueError, match=rf"^file: key 'format_version' .* expected an integer from 1 to {newest}"
        ):
            check_format_version({"format_version": wrong}, kind, "file")
