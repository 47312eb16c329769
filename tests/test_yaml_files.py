"""YAML that is no recipe is refused by name, whatever PyYAML would make of it."""

from pathlib import Path

import pytest

from hf_aegis.yaml_files import parse_yaml, read_yaml


# Ten levels of ten: a hundred thousand million values in half a kilobyte.
BILLION_LAUGHS = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{below}: &{below} [{', '.join([f'*{above}'] * 10)}]\n"
    for above, below in zip("abcdefghij", "bcdefghijk", strict=True)
)
MERGED_LAUGHS = "a: &a {x: 1}\n" + "".join(
    f"{below}: &{below} {{<<: [{', '.join([f'*{above}'] * 10)}]}}\n"
    for above, below in zip("abcdefghij", "bcdefghijk", strict=True)
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 1\na: 2", "the key 'a' stands there twice"),
        ("b: {a: 1, a: 1}", "the key 'a' stands there twice"),
        ("a: &a [*a]", "a value holds itself"),
        ("&a {b: *a}", "a value holds itself"),
        (BILLION_LAUGHS, "more than 100000 values"),
        (MERGED_LAUGHS, "more than 100000 values"),
        # In time that does not grow with the square of the depth.
        ("[" * 100_000, "nested too deeply"),
        ("a: " + "{a: " * 101, "nested too deeply"),
        ("- " * 101 + "a", "nested too deeply"),
        ("a: !!python/object/apply:os.system ['true']", "the tag .* is refused"),
        ("a: !!int x", "the tag .* is refused"),
        ("a: 2001-99-99", "month must be in 1..12"),
        ("a: " + "9" * 5000, "4300 digits"),
        ("a: " + ":".join(["59"] * 400) + ".5", "too large"),
        ("{[1]: 2}", "unhashable key"),
        ("a: [", "expected"),
        ("a: 1\n---\na: 2", "single document"),
        (b"\xff\xfe", "can't decode"),
        ("\x00", "special characters"),
    ],
)
def test_what_is_no_plain_yaml_is_refused_by_name(text: str | bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s)^recipe.yaml: not valid YAML: .*{reason}") as caught:
        parse_yaml(text, "recipe.yaml")
    assert type(caught.value) is ValueError


def test_merge_keys_and_aliases_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("p: {q: &x {<<: &w {a: 1, b: 1}, a: 2}}\ny: {<<: *x, b: 3}\nz: [*x, *x]\n")
    assert read_yaml(tmp_path / "a.yaml") == {
        "p": {"q": {"a": 2, "b": 1}},
        "y": {"a": 2, "b": 3},
        "z": [{"a": 2, "b": 1}, {"a": 2, "b": 1}],
    }
