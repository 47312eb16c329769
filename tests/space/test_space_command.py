import json
import subprocess
import sys

import pytest
from huggingface_hub import SpaceCard

from hf_aegis.cli import main
from hf_aegis.cli.space import MODEL_VARIABLES, assemble, space_folder


@pytest.fixture(autouse=True)
def _nothing_chosen(monkeypatch):
    for name in MODEL_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_the_card_is_what_a_space_needs():
    gradio = pytest.importorskip("gradio")
    card = SpaceCard.load(space_folder() / "README.md", ignore_metadata_errors=False)
    assert (card.data.sdk, card.data.app_file, card.data.license) == ("gradio", "app.py", "apache-2.0")
    assert card.data.sdk_version == gradio.__version__, "as in requirements.lock, on which the page is tested"
    # The Hub refuses longer ones.
    assert len(card.data.short_description) <= 60
    assert (space_folder() / card.data.app_file).is_file()
    assert "{{" not in card.content


def test_gradio_is_pinned_by_the_card_alone(tmp_path):
    assemble(space_folder(), tmp_path / "space")
    for folder in (space_folder(), tmp_path / "space"):
        assert "gradio" not in (folder / "requirements.txt").read_text()


def test_the_package_goes_along_with_its_dependencies(tmp_path):
    folder = tmp_path / "space"
    assemble(space_folder(), folder)
    requirements = (folder / "requirements.txt").read_text().splitlines()
    assert any(each.startswith("transformers") for each in requirements)
    assert not any("extra" in each for each in requirements)
    assert not list(folder.rglob("__pycache__"))
    # Without anything of this checkout on the path.
    code = "from hf_aegis import assets; print(*assets.DEMO_CHECKPOINTS.values(), assets.EMBEDDED_VLM)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env={}, capture_output=True, text=True, check=True
    )
    assert all(path.startswith(str(folder)) for path in found.stdout.split())


def test_a_requirement_takes_the_package_s_place(tmp_path):
    assemble(space_folder(), tmp_path / "space", "hf-aegis==0.1.0")
    assert (tmp_path / "space" / "requirements.txt").read_text() == "hf-aegis==0.1.0\n"
    assert not (tmp_path / "space" / "hf_aegis").exists()


def test_models_chosen_here_are_chosen_there(tmp_path, monkeypatch):
    monkeypatch.setenv("AEGIS_SPACE_NAIVE", "org/naive")
    monkeypatch.setenv("AEGIS_SPACE_HELD", "")
    assemble(space_folder(), tmp_path / "space", "hf-aegis")
    assert SpaceCard.load(tmp_path / "space" / "README.md").data.models == ["org/naive"]
    chosen = json.loads((tmp_path / "space" / "models.json").read_text())
    assert chosen == {"AEGIS_SPACE_NAIVE": "org/naive", "AEGIS_SPACE_HELD": ""}


def test_a_folder_of_this_machine_is_not_deployed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AEGIS_SPACE_NAIVE", str(tmp_path))
    assert main(["space", "--push_to_hub", "org/page", "--output_dir", str(tmp_path / "space")]) == 2
    assert "a Space cannot see" in capsys.readouterr().err
    assert not (tmp_path / "space").exists()


def test_somebody_s_folder_is_not_overwritten(tmp_path):
    # A Space of one's own, for one.
    (tmp_path / "app.py").write_text("years of work")
    for folder in (tmp_path, tmp_path / "app.py"):
        with pytest.raises(ValueError, match="holds something else than what this command has put there"):
            assemble(space_folder(), folder)
    assert (tmp_path / "app.py").read_text() == "years of work"
    with pytest.raises(ValueError, match="holds something else"):
        assemble(space_folder(), space_folder())
    assert (space_folder() / "app.py").is_file()


def test_it_is_deployed_in_one_commit(hub, tmp_path, capsys):
    options = ["--package", "hf-aegis", "--private", "--output_dir", str(tmp_path / "space")]
    assert main(["space", "--push_to_hub", "org/page", *options]) == 0
    repository = hub.repo("org/page", "space")
    assert repository.private
    there = {path.relative_to(tmp_path / "space").as_posix() for path in (tmp_path / "space").rglob("*.*")}
    expected = there - {".hf-aegis-space"}
    assert set(repository.files()) == expected
    assert {"app.py", "README.md", "requirements.txt", "geometry.json", "examples/1.png"} <= expected
    assert capsys.readouterr().out.strip().endswith("spaces/org/page")
    assert len(repository.history()) == 2, "creation, and one commit"


def test_models_of_an_earlier_deployment_do_not_stay(hub, tmp_path, monkeypatch):
    options = ["--push_to_hub", "org/page", "--package", "hf-aegis", "--output_dir", str(tmp_path / "space")]
    monkeypatch.setenv("AEGIS_SPACE_NAIVE", "org/naive")
    assert main(["space", *options]) == 0
    assert "models.json" in hub.repo("org/page", "space").files()
    monkeypatch.delenv("AEGIS_SPACE_NAIVE")
    assert main(["space", *options]) == 0
    assert "models.json" not in hub.repo("org/page", "space").files()


def test_a_failed_deployment_leaves_the_folder_and_says_how_to_retry(hub, tmp_path, capsys):
    hub.fail_next("POST", "/commit/", status=500, times=20)
    folder = tmp_path / "space"
    assert main(["space", "--push_to_hub", "org/page", "--package", "hf-aegis", "--output_dir", str(folder)]) == 2
    message = capsys.readouterr().err
    assert f"hf upload org/page {folder}" in message
    assert hub.token not in message
    assert (folder / "app.py").is_file()
