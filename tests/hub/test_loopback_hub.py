"""The server answers the real client as the Hub does; what it stores is what was sent."""

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    hf_hub_download,
    metadata_update,
    model_info,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


@pytest.fixture
def api(hub):
    return HfApi(token=hub.token)


@pytest.fixture
def filled(hub, api):
    """A model repository with a small file, a large one and one in a folder."""
    api.create_repo("org/filled")
    contents = {"a.json": b"{}", "large.safetensors": bytes(range(256)) * 4, "folder/b.txt": b"b\n"}
    api.create_commit(
        "org/filled",
        [CommitOperationAdd(name, content) for name, content in contents.items()],
        commit_message="Fill",
    )
    return "org/filled"


def test_who_asks_is_known_by_the_token(hub, api):
    assert api.whoami()["name"] == "writer"
    assert [org["name"] for org in api.whoami()["orgs"]] == ["org"]
    with pytest.raises(HTTPError, match="Invalid user token"):
        HfApi(token=hub.bad_token).whoami()


def test_files_come_back_as_they_were_sent(hub, api, filled):
    assert set(hub.repo(filled).files()) == {"a.json", "large.safetensors", "folder/b.txt"}
    for name, content in hub.repo(filled).files().items():
        path = hf_hub_download(filled, name)
        with open(path, "rb") as file:
            assert file.read() == content
        assert f"/snapshots/{hub.repo(filled).branches['main']}/" in path
    assert sorted(api.list_repo_files(filled)) == [".gitattributes", "a.json", "folder/b.txt", "large.safetensors"]
    (info,) = api.get_paths_info(filled, "large.safetensors")
    assert (info.size, info.lfs.size) == (1024, 1024)
    folder = snapshot_download(filled, allow_patterns="folder/*")
    assert sorted(str(path) for path in HfFileSystem().ls(filled, detail=False)) == [
        f"{filled}/.gitattributes",
        f"{filled}/a.json",
        f"{filled}/folder",
        f"{filled}/large.safetensors",
    ]
    assert HfFileSystem().read_bytes(f"{filled}/large.safetensors", start=250, end=260) == bytes(
        [250, 251, 252, 253, 254, 255, 0, 1, 2, 3]
    )
    assert folder


def test_a_commit_deletes_and_a_repository_moves_and_goes(hub, api, filled):
    api.create_commit(filled, [CommitOperationDelete("folder/"), CommitOperationDelete("a.json")], commit_message="x")
    assert set(hub.repo(filled).files()) == {"large.safetensors"}
    assert [commit.title for commit in api.list_repo_commits(filled)] == ["x", "Fill", "initial commit"]
    api.move_repo(filled, "org/moved")
    assert not api.repo_exists(filled)
    api.update_repo_settings("org/moved", private=True)
    assert api.model_info("org/moved").private
    api.delete_repo("org/moved")
    assert not hub.has_repo("org/moved")


def test_branches_tags_and_pull_requests_are_revisions(hub, api, filled):
    api.create_branch(filled, branch="try/one")
    api.create_tag(filled, tag="v1")
    commit = api.upload_file(path_or_fileobj=b"new", path_in_repo="new.txt", repo_id=filled, revision="try/one")
    asked = api.upload_file(path_or_fileobj=b"asked", path_in_repo="new.txt", repo_id=filled, create_pr=True)
    assert asked.pr_revision == "refs/pr/1"
    refs = api.list_repo_refs(filled, include_pull_requests=True)
    assert [branch.name for branch in refs.branches] == ["main", "try/one"]
    assert [tag.name for tag in refs.tags] == ["v1"]
    assert [pull.ref for pull in refs.pull_requests] == ["refs/pr/1"]
    for revision, content in (("try/one", b"new"), (commit.oid, b"new"), ("refs/pr/1", b"asked")):
        with open(hf_hub_download(filled, "new.txt", revision=revision), "rb") as file:
            assert file.read() == content
    for revision in ("main", "v1"):
        with pytest.raises(EntryNotFoundError):
            hf_hub_download(filled, "new.txt", revision=revision)
    with pytest.raises(RevisionNotFoundError):
        api.model_info(filled, revision="v2")
    with pytest.raises(HfHubHTTPError, match="Reference already exists"):
        api.create_branch(filled, branch="try/one")


def test_what_is_private_or_gated_is_shown_to_members_only(hub, api, filled):
    api.create_repo("org/secret", private=True, repo_type="dataset")
    assert api.repo_info("org/secret", repo_type="dataset").private
    for token in (hub.stranger_token, False):
        with pytest.raises(RepositoryNotFoundError):
            api.repo_info("org/secret", repo_type="dataset", token=token)
    assert api.repo_info("org/secret", repo_type="dataset", token=hub.read_only_token).private
    hub.repo(filled).gated = True
    with pytest.raises(GatedRepoError):
        hf_hub_download(filled, "a.json", token=hub.stranger_token)
    hf_hub_download(filled, "a.json", token=hub.read_only_token)


def test_only_a_token_that_may_write_writes(hub, api, filled):
    for token, message in (
        (hub.read_only_token, "write token"),
        (hub.stranger_token, "create_pr"),
        (hub.bad_token, "Invalid credentials"),
    ):
        with pytest.raises(HfHubHTTPError, match=message):
            api.upload_file(path_or_fileobj=b"", path_in_repo="x", repo_id=filled, token=token)
    with pytest.raises(HfHubHTTPError, match="rights to create"):
        api.create_repo("elsewhere/name")
    assert set(hub.repo(filled).files()) == {"a.json", "large.safetensors", "folder/b.txt"}


def test_a_commit_on_another_than_the_newest_is_a_conflict(hub, api, filled):
    parent = api.model_info(filled).sha
    hub.repo(filled).replace("a.json", b"[]")
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        api.upload_file(path_or_fileobj=b"1", path_in_repo="a.json", repo_id=filled, parent_commit=parent)
    assert hub.repo(filled).files()["a.json"] == b"[]"


def test_metadata_is_checked(hub, api, filled):
    card = b"---\nlicense: nonsense\n---\n"
    with pytest.raises(ValueError, match='"license" must be one of'):
        api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=filled)
    metadata_update(filled, {"license": "mit", "tags": ["x"]})
    info = api.model_info(filled)
    assert (info.card_data.license, info.tags) == ("mit", ["x"])


def test_faults_come_once_each(hub, api, filled):
    hub.fail_next("POST", "/commit/", status=503, message="down")
    with pytest.raises(HfHubHTTPError, match="down"):
        api.upload_file(path_or_fileobj=b"1", path_in_repo="a.json", repo_id=filled)
    hub.fail_next("POST", "/commit/", kind="drop")
    with pytest.raises(HTTPError, match="disconnected"):
        api.upload_file(path_or_fileobj=b"1", path_in_repo="a.json", repo_id=filled)
    hub.fail_next("PUT", "/lfs/", status=500, after=1)  # the client asks again
    operations = [CommitOperationAdd(f"{n}.safetensors", bytes([n]) * 9) for n in range(3)]
    api.create_commit(filled, operations, commit_message="three")
    hub.fail_next("GET", "/lfs/", kind="cut")
    with open(hf_hub_download(filled, "large.safetensors"), "rb") as file:
        assert file.read() == hub.repo(filled).files()["large.safetensors"]
    assert set(hub.repo(filled).files()) >= {"0.safetensors", "1.safetensors", "2.safetensors"}
    with hub.unreachable(), pytest.raises(HTTPError):
        model_info(filled)
    assert model_info(filled)
