from pathlib import Path

import pytest

from hf_aegis.machine_paths import portable_name, snapshot_commit, without_machine_paths


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "compare --config /home/me/recipes/a.yaml --output_dir /data/out",
            "compare --config recipes/a.yaml --output_dir out",
        ),
        ('--override \'{"model": "/data/vlm/"}\'', '--override \'{"model": "vlm"}\''),
        (
            "code 1: /x/y/z.hdf5: no such file (all of it in /home/me/out/n.log)",
            "code 1: z.hdf5: no such file (all of it in out/n.log)",
        ),
        ("--anchor=/home/me/anchor", "--anchor=anchor"),
        ("/home/me", "me"),
        ("/home/mean/a", "a"),
    ],
)
def test_paths_inside_the_working_directory_become_relative_and_others_names(text, expected):
    assert without_machine_paths(text, Path("/home/me")) == expected


@pytest.mark.parametrize("text", ["yes/no", "org/model", "https://a.b/c/d", "outputs/a/b", "1 / 2", "../a/b", "/"])
def test_what_is_no_absolute_path_stays(text):
    assert without_machine_paths(text) == text


def test_texts_are_found_at_any_depth():
    settings = {"model": "/data/vlm", "seeds": [0, 1], "more": [{"paths": ["/a/b", None]}], "rate": 0.1}
    assert without_machine_paths(settings, Path("/home/me")) == {
        "model": "vlm",
        "seeds": [0, 1],
        "more": [{"paths": ["b", None]}],
        "rate": 0.1,
    }
    assert settings["model"] == "/data/vlm"


def test_portable_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "policy").mkdir(parents=True)
    commit = "0123456789" * 4
    assert portable_name("google/paligemma2-3b-mix-224") == "google/paligemma2-3b-mix-224"
    assert portable_name("outputs/policy") == "policy"
    assert portable_name(tmp_path / "outputs" / "policy" / "") == "policy"
    assert portable_name("/gone/policy") == "policy"
    snapshot = f"/home/me/hub/models--org--policy-1/snapshots/{commit}"
    assert (portable_name(snapshot), snapshot_commit(snapshot)) == ("org/policy-1", commit)
    assert snapshot_commit("outputs/policy") is None
