import hashlib
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

from hf_aegis.hub import hub_commit


@pytest.mark.parametrize("kind", ["model", "dataset"])
@pytest.mark.parametrize("revision", [None, "v2"])
def test_a_branch_or_tag_has_the_commit_that_the_hub_says(monkeypatch, kind, revision):
    def info(repository, *, revision, timeout):
        return SimpleNamespace(sha=hashlib.sha1(f"{kind} {repository} {revision}".encode()).hexdigest())

    monkeypatch.setattr(f"huggingface_hub.{kind}_info", info)
    expected = hashlib.sha1(f"{kind} org/name {revision}".encode()).hexdigest()
    assert hub_commit(kind, "org/name", revision) == expected


def test_a_commit_and_a_path_need_no_hub(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr("huggingface_hub.model_info", lambda *args, **kwargs: pytest.fail("the Hub was asked"))
    assert hub_commit("model", "org/name", "0a" * 20) == "0a" * 20
    assert hub_commit("model", str(tmp_path)) is None
    assert not caplog.records


@pytest.mark.parametrize("error", [OfflineModeIsEnabled("no\nnetwork"), HTTPError("no network")])
def test_where_the_hub_does_not_say_a_warning_does(monkeypatch, caplog, error):
    def info(repository, **kwargs):
        raise error

    monkeypatch.setattr("huggingface_hub.dataset_info", info)
    assert hub_commit("dataset", "org/name") is None
    assert hub_commit("dataset", "org/name", "main") == "main"
    assert "the commit of the dataset org/name is not known" in caplog.text
    assert "no network" in caplog.text


def test_what_is_no_id_is_left_to_who_loads_it(caplog):
    assert hub_commit("model", "/no/such/folder") is None
    assert "/no/such/folder is not known" in caplog.text


def test_the_hub_itself_says_which_commit(hub, caplog):
    HfApi().create_repo("org/name", repo_type="dataset")
    first = hub.repo("org/name", "dataset").branches["main"]
    HfApi().create_tag("org/name", tag="v1", repo_type="dataset")
    newest = hub.repo("org/name", "dataset").replace("a.txt", b"a")
    assert hub_commit("dataset", "org/name") == newest
    assert hub_commit("dataset", "org/name", "v1") == first
    assert not caplog.records
    assert hub_commit("dataset", "org/nothing", "v1") == "v1"
    assert hub.token not in caplog.text
