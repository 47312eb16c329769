"""The table of faults names tests that there are, and says which of them are slow."""

import ast
import re
from pathlib import Path

import pytest


TESTS = Path(__file__).parent
PAGE = TESTS / "FAULTS.md"
NAMED = re.compile(r"`([\w/]+\.py)::(test_\w+)`( \*slow\*)?")


def rows() -> list[tuple[str, str, str]]:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|") and not line.startswith("|---")]
    cells = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]
    return [row for row in cells if row != ("fault", "what happens", "test")]


def functions_of(path: Path) -> dict[str, ast.FunctionDef]:
    """By name, the tests of a file, those in classes too."""
    return {node.name: node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def is_slow(path: Path, function: ast.FunctionDef) -> bool:
    marked = any("slow" in ast.unparse(decorator) for decorator in function.decorator_list)
    return marked or re.search(r"^pytestmark = .*slow", path.read_text(), re.MULTILINE) is not None


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_every_fault_has_tests_that_exist(row: tuple[str, ...]) -> None:
    assert len(row) == 3, f"a row has three cells, this one {len(row)}: {row}"
    named = NAMED.findall(row[2])
    assert named, f"no test is named as `folder/file.py::test_name` in {row[2]!r}"
    for file, name, slow in named:
        path = TESTS / file
        assert path.is_file(), f"{file} is not in tests/"
        functions = functions_of(path)
        assert name in functions, f"{file} has no {name}"
        assert is_slow(path, functions[name]) == bool(slow), f"{file}::{name}: *slow* belongs beside slow tests alone"
