"""What pyproject.toml says of versions, what the lock files hold, and what is told of them are one."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version


ROOT = Path(__file__).parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = SETTINGS["project"]
EXTRAS = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
DECLARED = [(extra, Requirement(line)) for extra, lines in EXTRAS.items() for line in lines]


def locked(name):
    """By package, the versions that a lock file holds: one, or one for each range of Pythons."""
    found = {}
    for line in (ROOT / name).read_text().splitlines():
        if match := re.match(r"([\w.-]+)==([^ ;]+)", line):
            found.setdefault(canonicalize_name(match[1]), []).append(Version(match[2]))
    return found


def minor_versions():
    """Pythons that the classifiers name, in order."""
    prefix = "Programming Language :: Python :: "
    return [line.removeprefix(prefix) for line in PROJECT["classifiers"] if line.startswith(prefix)]


@pytest.mark.parametrize(("extra", "requirement"), DECLARED, ids=[f"{extra}-{r.name}" for extra, r in DECLARED])
def test_bounds_are_what_is_locked(extra, requirement):
    (bound,) = requirement.specifier
    newest = locked("requirements.lock")[canonicalize_name(requirement.name)]
    assert all(version in requirement.specifier for version in newest), "`make lock` resolves them anew"
    lowest = locked("requirements-lowest.lock").get(canonicalize_name(requirement.name))
    if extra == "libero":
        assert bound.operator == "==", "bounds of the simulator are not tested, so it has none"
    else:
        assert bound.operator in (">=", "=="), "without a lowest version there is none to test"
        assert lowest == [Version(bound.version)], "either the bound is too low to be had, or `make lock` was left out"


def test_pythons_are_the_same_everywhere():
    pythons = minor_versions()
    lowest = pythons[0]
    assert SpecifierSet(PROJECT["requires-python"]) == SpecifierSet(f">={lowest}")
    numbers = [int(python.removeprefix("3.")) for python in pythons]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert SETTINGS["tool"]["mypy"]["python_version"] == lowest
    assert SETTINGS["tool"]["ruff"]["target-version"] == f"py{lowest.replace('.', '')}"
    makefile = (ROOT / "Makefile").read_text()
    assert f"sys.version_info < ({lowest.replace('.', ', ')})" in makefile
    assert f"needs Python {lowest} or newer" in makefile
    assert set(re.findall(r"--python-version (\S+)", makefile)) == {lowest}


def test_the_table_of_tested_versions_is_of_the_lock_files():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    header, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if line.startswith(("| Python |", "| 3."))
    ]
    packages = header[2:-1]
    assert {row[0] for row in rows} == set(minor_versions())
    assert {row[1] for row in rows} == {"lowest", "locked"}
    for python, kind, *versions, _ in rows:
        lock = locked("requirements-lowest.lock" if kind == "lowest" else "requirements.lock")
        for package, version in zip(packages, versions, strict=True):
            # Where a lock has several, the last is for the newest Python.
            expected = lock[canonicalize_name(package)][-1 if python != minor_versions()[0] else 0]
            assert Version(version) == expected, f"{package} on Python {python}, {kind}"
