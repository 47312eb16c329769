import hashlib
import logging

import pytest
from huggingface_hub import HfApi

from hf_aegis.hub import HubUploadError, push_folder


CONTENTS = {
    "config.json": b"{}",
    "weights.safetensors": bytes(300),
    "figures/loss.png": b"\x89PNG\0",
    "notes.txt": b"n",
}


@pytest.fixture
def folder(tmp_path):
    """A folder with small and large files, and some that are not to be pushed."""
    target = tmp_path / "my results"
    for name, content in {**CONTENTS, ".git/config": b"", ".config.json.1-ab.tmp": b""}.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(content)
    return target


def digest(folder):
    """Names, contents and times of change of everything in a folder."""
    found = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for name, path in found.items()
    }


@pytest.mark.parametrize("kind", ["model", "dataset"])
@pytest.mark.parametrize("private", [True, False, None])
def test_a_folder_arrives_whole_in_one_commit(hub, folder, kind, private):
    before = digest(folder)
    commit = push_folder(folder, "org/name", repo_type=kind, private=private, commit_message="Results")
    repository = hub.repo("org/name", kind)
    assert repository.files() == CONTENTS
    assert [made.title for made in repository.history()] == ["Results", "initial commit"]
    assert (commit.oid, repository.private) == (repository.branches["main"], bool(private))
    assert commit.commit_url.startswith(hub.url)
    assert digest(folder) == before


def test_what_is_pushed_again_replaces_and_leaves_the_rest(hub, folder):
    push_folder(folder, "org/name")
    hub.repo("org/name").replace("other.txt", b"somebody's")
    (folder / "notes.txt").write_bytes(b"new")
    push_folder(folder, "org/name")
    assert hub.repo("org/name").files() == {**CONTENTS, "notes.txt": b"new", "other.txt": b"somebody's"}
    assert hub.repo("org/name").history()[0].title == "Upload my results"
    newest = hub.repo("org/name").branches["main"]
    assert push_folder(folder, "org/name").oid == newest, "nothing has changed, and nothing is committed"


def test_what_does_not_go_with_the_new_files_is_deleted_in_the_same_commit(hub, folder):
    push_folder(folder, "org/name")
    for name in ("weights-2.safetensors", "other.txt"):
        hub.repo("org/name").replace(name, b"old")
    commits = len(hub.repo("org/name").history())
    (folder / "notes.txt").write_bytes(b"new")
    push_folder(folder, "org/name", delete_patterns=["weights*", ".git*"])
    repository = hub.repo("org/name")
    assert repository.files() == {**CONTENTS, "notes.txt": b"new", "other.txt": b"old"}
    assert ".gitattributes" in repository.resolve().files
    assert len(repository.history()) == commits + 1
    (folder / "notes.txt").write_bytes(b"newer")
    hub.fail_next("POST", "/commit/")
    with pytest.raises(HubUploadError, match=r"--delete 'weights\*'"):
        push_folder(folder, "org/name", delete_patterns="weights*")


def test_a_name_alone_is_one_s_own(hub, folder):
    push_folder(folder, "name")
    assert hub.repo("writer/name").files() == CONTENTS


def test_patterns_choose(hub, folder):
    push_folder(folder, "org/name", allow_patterns=("*.json", "figures/*", "*.txt"), ignore_patterns="notes*")
    assert set(hub.repo("org/name").files()) == {"config.json", "figures/loss.png"}


def test_a_revision_is_a_branch_that_is_made_where_it_is_missing(hub, folder):
    for _ in range(2):
        push_folder(folder, "org/name", revision="try/one")
        (folder / "notes.txt").write_bytes(b"second")
    repository = hub.repo("org/name")
    assert repository.files("try/one")["notes.txt"] == b"second"
    assert repository.files("main") == {}
    assert len(repository.history("try/one")) == 3
    with pytest.raises(ValueError, match="must be a branch to push to, found the commit"):
        push_folder(folder, "org/name", revision=repository.branches["main"])


def test_a_pull_request_changes_no_branch(hub, folder):
    HfApi().create_repo("org/name")
    commit = push_folder(folder, "org/name", create_pr=True, token=hub.stranger_token)
    assert commit.pr_revision == "refs/pr/1"
    assert hub.repo("org/name").files("refs/pr/1") == CONTENTS
    assert hub.repo("org/name").files() == {}
    push_folder(folder, "org/name", revision="refs/pr/1", ignore_patterns="*.txt", token=hub.token)
    with pytest.raises(ValueError, match="a pull request goes to the main branch"):
        push_folder(folder, "org/name", create_pr=True, revision="try")


def test_what_should_be_private_is_not_published(hub, folder):
    HfApi().create_repo("org/public")
    before = len(hub.requests)
    with pytest.raises(HubUploadError, match="exists and is public, and a private one was asked for"):
        push_folder(folder, "org/public", private=True)
    assert hub.repo("org/public").files() == {}
    assert not any("commit" in path or "lfs" in path or "preupload" in path for _, path in hub.requests[before:])
    with pytest.raises(HubUploadError, match=r"repeat the call$"):
        push_folder(folder, "elsewhere/hidden", private=True)
    HfApi().create_repo("org/hidden", private=True)
    push_folder(folder, "org/hidden", private=False)
    assert hub.repo("org/hidden").private, "an existing repository keeps its visibility"


FAILURES = {
    "bad token": ({"token": "bad_token"}, {}, "does not accept the token .*Invalid credentials"),
    "read-only token": ({"token": "read_only_token"}, {}, "does not permit it .*rights to create"),
    "another's namespace": ({"token": "stranger_token"}, {}, "does not permit it .*rights to create"),
    "creation fails": ({}, {"path": "/repos/create", "status": 500}, "the Hub failed with status 500"),
    "conflict": (
        {},
        {"path": "/commit/", "status": 412, "message": "A commit has happened since"},
        "pushed at the same time",
    ),
    "server error in the middle": (
        {},
        {"path": "/lfs/", "method": "PUT", "after": 1, "times": 99},
        "failed with status 500",
    ),
    "refused content": ({}, {"path": "/lfs/", "method": "PUT", "status": 403, "message": "no"}, "does not permit it"),
    "server error at the end": ({}, {"path": "/commit/", "status": 503, "message": "down"}, r"status 503 \(down\)"),
    "connection breaks": ({}, {"path": "/commit/", "kind": "drop"}, "could not be reached"),
    "no connection": ({}, {"kind": "drop", "times": 99}, "could not be reached"),
    "too many requests": ({}, {"path": "/commit/", "status": 429, "message": "slow"}, "too many requests"),
}


@pytest.mark.parametrize(("options", "fault", "message"), FAILURES.values(), ids=FAILURES)
def test_a_push_that_fails_loses_nothing_and_says_how_to_retry(hub, folder, caplog, options, fault, message):
    caplog.set_level(logging.DEBUG)
    before = digest(folder)
    options = {name: getattr(hub, value) for name, value in options.items()}
    if fault:
        hub.fail_next(**fault)
    with pytest.raises(HubUploadError, match=message) as found:
        push_folder(folder, "org/name", repo_type="dataset", revision="try", ignore_patterns="*.log", **options)
    text = str(found.value)
    assert "\n" not in text
    assert f"run `hf upload org/name '{folder}' . --repo-type dataset --revision try --exclude '*.log'`" in text
    assert "to the dataset repository org/name (revision try)" in text
    assert digest(folder) == before
    assert not hub.has_repo("org/name", "dataset") or hub.repo("org/name", "dataset").files() == {}
    for token in (hub.token, hub.read_only_token, hub.bad_token, hub.stranger_token):
        assert token not in text + caplog.text + str(found.value.__cause__)
    hub.faults.clear()
    push_folder(folder, "org/name", repo_type="dataset", revision="try")
    assert hub.repo("org/name", "dataset").files("try") == CONTENTS


def test_offline_nothing_is_asked(hub, folder):
    with hub.offline(), pytest.raises(HubUploadError, match=r"HF_HUB_OFFLINE is set.*unset it"):
        push_folder(folder, "org/name")


def test_a_read_only_token_sees_the_repository_but_does_not_write(hub, folder):
    HfApi().create_repo("org/name")
    with pytest.raises(HubUploadError, match="you must use a write token"):
        push_folder(folder, "org/name", token=hub.read_only_token)


@pytest.mark.parametrize("repo_id", ["a/b/c", "org/na me", "org/--", "/absolute/path"])
def test_what_is_no_id_is_refused(hub, folder, repo_id):
    with pytest.raises(HubUploadError, match="was not pushed"):
        push_folder(folder, repo_id)


def test_a_card_that_the_hub_does_not_take_is_told(hub, folder):
    (folder / "README.md").write_text("---\nlicense: nonsense\n---\n")
    with pytest.raises(HubUploadError, match=r'Invalid metadata in README.md.*"license" must be one of'):
        push_folder(folder, "org/name")
    assert hub.repo("org/name").files() == {}


def test_a_token_that_is_no_header_is_not_shown(hub, folder):
    with pytest.raises(HubUploadError) as found:
        push_folder(folder, "org/name", token="hf_not\na header")
    assert "not\\na" not in str(found.value) and "a header" not in str(found.value)
    assert found.value.__cause__ is None


@pytest.mark.parametrize(("name", "message"), [("missing", "is no folder"), ("empty", "holds no file to push")])
def test_there_has_to_be_something_to_push(hub, tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(HubUploadError, match=message):
        push_folder(tmp_path / name, "org/name")
    assert hub.requests == []
