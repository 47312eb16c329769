import pytest
from huggingface_hub import HfApi

from hf_aegis.hub import HubDownloadError, download_files, push_folder


NAMES = ("a.safetensors", "a.json")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "inner").mkdir()
    for name in (*NAMES, *(f"inner/{name}" for name in NAMES)):
        (tmp_path / name).write_bytes(name.encode() * 9)
    return tmp_path


@pytest.mark.parametrize("subfolder", [None, "inner"])
def test_files_come_from_branch_tag_and_commit_into_the_cache(hub, folder, subfolder, tmp_path_factory):
    commit = push_folder(folder, "org/name", repo_type="dataset", revision="try")
    HfApi().create_tag("org/name", tag="v1", revision="try", repo_type="dataset")
    hub.repo("org/name", "dataset").replace("a.json", b"other", "try")
    hub.repo("org/name", "dataset").replace("inner/a.json", b"other", "try")
    start = folder / (subfolder or "")
    other = tmp_path_factory.mktemp("cache")
    for revision, small in (("v1", None), (commit.oid, None), ("try", b"other")):
        for cache in (None, other):
            files = download_files(
                "org/name", NAMES, repo_type="dataset", revision=revision, cache_dir=cache, subfolder=subfolder
            )
            expected = [(start / NAMES[0]).read_bytes(), small or (start / NAMES[1]).read_bytes()]
            assert [file.read_bytes() for file in files] == expected
            assert all(file.is_relative_to(cache or hub.cache) for file in files)


def test_all_files_are_of_one_commit_though_somebody_pushes(hub, folder, monkeypatch):
    push_folder(folder, "org/name")
    from hf_aegis.hub import download

    real = download.hf_hub_download

    def slowly(repo_id, name, **options):
        path = real(repo_id, name, **options)
        hub.repo("org/name").replace("a.json", b"another's")
        return path

    monkeypatch.setattr(download, "hf_hub_download", slowly)
    files = download_files("org/name", NAMES)
    assert files[1].read_bytes() == (folder / "a.json").read_bytes()
    assert files[0].parent == files[1].parent


def test_what_is_cached_is_there_offline_and_the_rest_is_told(hub, folder):
    push_folder(folder, "org/name", allow_patterns="a.*")
    HfApi().create_repo("org/other")
    files = download_files("org/name", NAMES)
    commit = hub.repo("org/name").branches["main"]
    with hub.offline():
        assert download_files("org/name", NAMES) == files
        assert download_files("org/name", NAMES, revision=commit) == files
        for repo_id, name, revision in (
            ("org/name", "b", None),
            ("org/other", "a.json", None),
            ("org/name", "b", "v2"),
        ):
            with pytest.raises(
                HubDownloadError, match=rf"no {name} from the model repository {repo_id} .*not in the cache"
            ):
                download_files(repo_id, [name], revision=revision)
    before = len(hub.requests)
    assert download_files("org/name", NAMES, local_files_only=True) == files
    with pytest.raises(HubDownloadError, match=r"a download was not allowed \(local_files_only\)"):
        download_files("org/other", NAMES, local_files_only=True)
    assert len(hub.requests) == before
    with hub.unreachable():
        assert download_files("org/name", NAMES) == files
        with pytest.raises(HubDownloadError, match="could not be reached"):
            download_files("org/other", NAMES)


FAILURES = {
    "no repository": (
        {"repo_id": "org/nothing"},
        "model repository org/nothing .*no such repository, or it is private",
    ),
    "other kind": ({"repo_type": "dataset"}, "dataset repository org/name .*no such repository, or it is private"),
    "private": ({"repo_id": "org/secret", "token": "stranger_token"}, "no such repository, or it is private"),
    "nobody": ({"repo_id": "org/secret", "token": False}, "it is private and this token may not see it"),
    "gated": ({"repo_id": "org/gated", "token": "stranger_token"}, "it is gated: ask for access at http.*/org/gated"),
    "bad token": ({"token": "bad_token"}, "does not accept the token"),
    "revision": ({"revision": "v7"}, r"\(revision v7\) on the Hub: it has no such branch, tag or commit"),
    "file": ({"names": ["b.json"]}, "no b.json from .*it has no such file"),
    "no id": ({"repo_id": "org/na me"}, "Repo id must use alphanumeric chars"),
    "a path": ({"repo_id": "/no/such/folder"}, "Repo id must be in the form"),
}


@pytest.mark.parametrize(("options", "message"), FAILURES.values(), ids=FAILURES)
def test_what_cannot_be_had_is_told(hub, folder, options, message, caplog):
    for repo_id in ("org/name", "org/secret", "org/gated"):
        push_folder(folder, repo_id, private=repo_id == "org/secret")
    hub.repo("org/gated").gated = True
    if isinstance(token := options.get("token"), str):
        options = {**options, "token": getattr(hub, token)}
    with pytest.raises(HubDownloadError, match=message) as found:
        download_files(**{"repo_id": "org/name", "names": NAMES, **options})
    assert "\n" not in str(found.value)
    for token in (hub.token, hub.bad_token, hub.stranger_token):
        assert token not in f"{found.value} {found.value.__cause__} {caplog.text}"


def test_a_download_that_stops_half_way_is_told_and_leaves_nothing_broken(hub, folder):
    push_folder(folder, "org/name")
    hub.fail_next("GET", "/lfs/", kind="cut", times=99)
    with pytest.raises(HubDownloadError, match=r"no a\.safetensors"):
        download_files("org/name", NAMES)
    hub.faults.clear()
    assert [file.read_bytes() for file in download_files("org/name", NAMES)] == [
        (folder / name).read_bytes() for name in NAMES
    ]
