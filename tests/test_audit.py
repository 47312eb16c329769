"""Licences of what is installed, and an audit that does not call itself done where it was not."""

import importlib.util
import re
from email.message import Message
from pathlib import Path

import pytest

from hf_aegis import assets


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def audit():
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Package:
    def __init__(self, name, **fields):
        self.version, self.files, self.metadata = "1.0", (), Message()
        for field, value in {"Name": name, **fields}.items():
            self.metadata[field.replace("_", "-")] = value


def test_every_locked_package_is_under_a_licence_that_is_allowed(audit):
    installed = list(audit.distributions())
    names = audit.locked()
    assert {"torch", "transformers", "gradio", "huggingface-hub", "websockets"} <= names
    assert len(names & {audit.normalised(package.metadata["Name"]) for package in installed}) > 100
    assert list(audit.refused(installed, names)) == []


def test_every_locked_package_is_pinned_by_hash():
    blocks = re.split(r"\n(?=[a-z0-9])", (ROOT / "requirements.lock").read_text())
    pinned = [block for block in blocks if re.match(r"[\w.\[\],-]+==", block)]
    assert len(pinned) > 100
    assert [block.partition(" ")[0] for block in pinned if "--hash=sha256:" not in block] == []


def test_no_exception_outlives_its_package(audit):
    assert set(audit.EXCEPTIONS) <= audit.locked()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"License_Expression": "AGPL-3.0-only"}, "'AGPL-3.0-only'"),
        ({"License_Expression": "MIT OR GPL-2.0-only"}, "'MIT OR GPL-2.0-only'"),
        ({"License": "GPLv3"}, "'GPLv3'"),
        ({}, "'no licence that it tells'"),
    ],
)
def test_another_licence_is_told(audit, fields, told):
    assert list(audit.refused([Package("Some.Package", **fields)], {"some-package"})) == [
        f"some-package 1.0 is under {told}"
    ]
    assert list(audit.refused([Package("other", **fields)], {"some-package"})) == []


@pytest.mark.parametrize(
    ("report", "code", "said"),
    [
        ([{"name": "a", "version": "1", "vulns": []}], 0, "no known vulnerability in 1 packages"),
        ([], 3, "NOT AUDITED for vulnerabilities: the database had nothing on 0 of 0"),
        # What pip-audit calls "No known vulnerabilities found".
        ([{"name": "a", "skip_reason": "not found on PyPI"}], 3, "NOT AUDITED for vulnerabilities: the database had"),
        (
            [
                {"name": "b", "skip_reason": "not found on PyPI"},
                {"name": "a", "version": "1", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2"]}]},
            ],
            1,
            "VULNERABLE: a 1: PYSEC-1, mended in 2",
        ),
    ],
)
def test_what_was_not_audited_is_not_well(audit, capsys, report, code, said):
    assert audit.read_report(report) == code
    assert said in "".join(capsys.readouterr())


def test_without_pip_audit_nothing_is_audited(audit, capsys, monkeypatch):
    def missing(*arguments, **options):
        raise FileNotFoundError("uv")

    monkeypatch.setattr(audit.subprocess, "run", missing)
    assert audit.report_vulnerabilities() == 3
    assert "NOT AUDITED for vulnerabilities: pip-audit gave no report" in capsys.readouterr().err


def test_the_licence_of_everything_that_ships_is_told():
    folder = Path(assets.__file__).parent
    told = (folder / "LICENSES.md").read_text()
    shipped = {path.name for path in folder.iterdir()} - {"LICENSES.md", "__init__.py", "__pycache__"}
    for name in shipped:
        assert f"## `{name}{'/' if (folder / name).is_dir() else ''}`" in told
