"""What an installed package has of what lies beside it in a checkout."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hf_aegis.hub import find_template


TEMPLATES = ("adapter.md", "anchor.md", "policy.md", "results.md")


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_found_in_a_checkout(name):
    assert find_template(name) == Path(__file__).parents[2] / "model_cards" / name


def test_templates_are_found_in_a_wheel(tmp_path, monkeypatch):
    build = pytest.importorskip("hatchling.build")
    monkeypatch.chdir(Path(__file__).parents[2])
    wheel = tmp_path / build.build_wheel(str(tmp_path))
    with zipfile.ZipFile(wheel) as file:
        names = [name for name in file.namelist() if not name.startswith("hf_aegis/assets/")]
        file.extractall(tmp_path / "installed", names)
    code = f"from hf_aegis.hub import find_template\nfor name in {TEMPLATES}: print(find_template(name))"
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'installed')!r})\n{code}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "installed" / "hf_aegis" / "model_cards"
    assert done.stdout.split() == [str(folder / name) for name in TEMPLATES]
