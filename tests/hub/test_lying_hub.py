"""A Hub whose answers are wrong: contents, hashes, sizes, names, commits, JSON, and where it sends its clients."""

import dataclasses
import json

import pytest

from hf_aegis.hub import HubDownloadError, HubUploadError, download_files, hub_commit, push_folder
from hf_aegis.hub.names import is_file_name
from hf_aegis.training.hub_checkpoint import download_checkpoint


NAMES = ("a.safetensors", "a.json")


@pytest.fixture
def folder(tmp_path):
    source = tmp_path / "source"
    (source / "last-checkpoint").mkdir(parents=True)
    for name in (*NAMES, "last-checkpoint/trainer_state.json", "last-checkpoint/model.safetensors"):
        (source / name).write_bytes(name.encode() * 9)
    return source


@pytest.fixture
def pushed(hub, folder):
    push_folder(folder, "org/name")
    return hub


def all_files(root):
    return {path for path in root.rglob("*") if path.is_file()}


def changing(hub, method, path, change, times=99):
    hub.fail_next(method, path, kind="change", times=times, change=change)


def with_body(change):
    return lambda answer: dataclasses.replace(answer, body=change(answer.body))


def with_headers(**changes):
    named = {name.replace("_", "-"): value for name, value in changes.items()}
    return lambda answer: dataclasses.replace(answer, headers={**answer.headers, **named})


@pytest.mark.parametrize(("path", "name"), [("/lfs/", NAMES[0]), ("/resolve/", NAMES[1])])
def test_a_content_that_is_not_the_announced_one_is_refused_and_forgotten(pushed, folder, path, name):
    """Of the right length: huggingface_hub compares lengths alone."""
    changing(pushed, "GET", path, with_body(lambda body: body[:-1] + b"?"))
    with pytest.raises(HubDownloadError, match=rf"no {name} .*: its content has the hash [0-9a-f]+, and the"):
        download_files("org/name", [name])
    pushed.faults.clear()
    (file,) = download_files("org/name", [name])
    assert file.read_bytes() == (folder / name).read_bytes()
    # So is what became another in the cache.
    file.resolve().write_bytes(b"another")
    with pytest.raises(HubDownloadError, match="what arrived is deleted, try again"):
        download_files("org/name", [name])
    assert download_files("org/name", [name])[0].read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("length", [lambda body: body[:-1], lambda body: body + b"more", lambda body: b""])
def test_a_content_of_another_length_is_refused(pushed, length):
    changing(pushed, "GET", "/lfs/", with_body(length))
    with pytest.raises(HubDownloadError, match=r"no a\.safetensors from the model repository org/name"):
        download_files("org/name", NAMES)


@pytest.mark.parametrize("size", ["9" * 400, "-1", "three", ""])
def test_a_size_that_no_file_has_is_refused(pushed, size):
    changing(pushed, "HEAD", "/resolve/", with_headers(X_Linked_Size=size))
    with pytest.raises(
        HubDownloadError, match=r"no a\.safetensors from .* answer tells a size that no file has: x-li"
    ):
        download_files("org/name", NAMES)


@pytest.mark.parametrize("commit", ["../../../../escaped", "/tmp/escaped", "..", ""])
def test_a_commit_that_is_a_path_leads_nowhere(pushed, tmp_path_factory, commit):
    root = tmp_path_factory.getbasetemp()
    before = all_files(root)
    changing(pushed, "HEAD", "/resolve/", with_headers(X_Repo_Commit=commit))
    with pytest.raises(HubDownloadError, match=r"no a\.json from"):
        download_files("org/name", ["a.json"])
    assert all(file.is_relative_to(pushed.cache) for file in all_files(root) - before)


@pytest.mark.parametrize("header", ["ETag", "X-Linked-Etag"])
@pytest.mark.parametrize(
    "etag", ['"../../../../escaped"', '"{root}/escaped"', '"{root}/secret"', "..", "a\\b", "W/", '""']
)
def test_an_etag_that_is_a_path_leads_nowhere(pushed, tmp_path_factory, header, etag):
    root = tmp_path_factory.getbasetemp()
    (root / "secret").write_bytes(b"of this machine")
    before = all_files(root)
    changing(pushed, "HEAD", "/resolve/", with_headers(**{header: etag.format(root=root)}))
    with pytest.raises(HubDownloadError, match=r"no a\.json from .* answer names a file by a path: "):
        download_files("org/name", ["a.json"])
    assert all_files(root) == before
    # Nothing is left of the check.
    pushed.faults.clear()
    assert download_files("org/name", ["a.json"])[0].read_bytes() == b"a.json" * 9


@pytest.mark.parametrize(
    "name",
    ["../a", "/etc/passwd", "last-checkpoint/../../a", "last-checkpoint//a", "a\\..\\b", "C:/a", "a\0b", "", "./a", 3],
)
def test_listed_names_that_are_no_files_of_the_repository_are_refused(pushed, tmp_path, tmp_path_factory, name):
    assert not is_file_name(name)
    root = tmp_path_factory.getbasetemp()
    before = all_files(root)

    def listing(body):
        found = json.loads(body)
        found["siblings"] += [{"rfilename": name}]
        return json.dumps(found).encode()

    changing(pushed, "GET", "/api/models/", with_body(listing))
    with pytest.raises(HubDownloadError, match="the Hub's list of its files cannot be understood"):
        download_checkpoint("org/name", tmp_path / "out")
    assert all_files(root) == before
    with pytest.raises(ValueError, match="no file of the model repository org/name can have the name"):
        download_files("org/name", [name])


def test_names_that_files_may_have():
    for name in ("a", "a/b.json", "checkpoint-3/optimizer.pt", "a b/ü…", "..a/b..", ".gitattributes"):
        assert is_file_name(name)


def test_a_listing_without_end_is_no_checkpoint(pushed, tmp_path):
    def listing(body):
        found = json.loads(body)
        found["siblings"] += [{"rfilename": f"last-checkpoint/{number}"} for number in range(5000)]
        return json.dumps(found).encode()

    changing(pushed, "GET", "/api/models/", with_body(listing))
    with pytest.raises(HubDownloadError, match="has 5002 files, expected at most 2000: it is no checkpoint"):
        download_checkpoint("org/name", tmp_path / "out")


WRONG = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"3",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"sha": 3, "siblings": 4}',
    b'{"sha": "main"}',
]


@pytest.mark.parametrize("body", WRONG, ids=lambda body: repr(body[:20]))
def test_answers_that_are_not_what_is_expected_are_told(pushed, tmp_path, folder, body, caplog):
    changing(pushed, None, "/api/", with_body(lambda _: body))
    with pytest.raises(HubDownloadError, match="no checkpoint from the model repository org/name") as told:
        download_checkpoint("org/name", tmp_path / "out")
    assert "\n" not in str(told.value)
    assert hub_commit("model", "org/name", "main") == "main"
    assert "the commit of the model org/name is not known" in caplog.text
    with pytest.raises(HubUploadError, match=r"was not pushed to the model repository org/name"):
        push_folder(folder, "org/name")


def test_a_failure_in_the_middle_is_told_and_the_next_try_goes_on(pushed, folder):
    pushed.fail_next("HEAD", "/resolve/", after=1, times=99)
    with pytest.raises(HubDownloadError, match=r"no a\.json from .*(status 500|did not deliver it)"):
        download_files("org/name", NAMES)
    pushed.faults.clear()
    before = len(pushed.requests)
    assert [file.read_bytes() for file in download_files("org/name", NAMES)] == [
        (folder / name).read_bytes() for name in NAMES
    ]
    assert not [path for method, path in pushed.requests[before:] if method == "GET" and "/lfs/" in path]


def test_redirections_without_end_are_left(pushed):
    def around(answer):
        headers = {**answer.headers, "Location": f"{pushed.url}/org/name/resolve/main/a.json"}
        return dataclasses.replace(answer, status=302, headers=headers)

    changing(pushed, None, "/resolve/", around, times=1000)
    before = len(pushed.requests)
    with pytest.raises(HubDownloadError, match=r"no a\.json from"):
        download_files("org/name", ["a.json"])
    assert len(pushed.requests) - before < 100


def test_a_token_does_not_go_where_a_redirection_leads(pushed):
    """A large file lies on another host, which is not told who asks."""
    download_files("org/name", NAMES)
    # Behind those of the upload.
    _, token = [asked for asked in pushed.tokens if asked[0].startswith("/lfs/")][-1]
    assert token is None
    assert pushed.token in {token for path, token in pushed.tokens if "/resolve/" in path}
