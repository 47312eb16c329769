"""Anchors pushed to and loaded from the Hub, which a loopback server is."""

import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from loopback_hub.metadata import check_metadata

from hf_aegis.anchors import ActivationAnchor, AnchorMismatchError, SubspaceOptions
from hf_aegis.hub import HubUploadError


NAME = "org/llama-anchor"


@pytest.fixture(scope="module")
def anchor(build_model, make_batches):
    return ActivationAnchor.collect(
        build_model("llama"), make_batches("llama"), dataset_id="org/questions:train", progress=False
    )


@pytest.fixture(scope="module")
def rich_anchor(build_model, make_batches):
    """One with subspaces and sensitivities."""
    options = SubspaceOptions(energy=0.99, max_rank=6, sensitivity=True)
    return ActivationAnchor.collect(
        build_model("llama"), make_batches("llama"), dataset_id="questions", subspaces=options, progress=False
    )


@pytest.fixture(autouse=True)
def own_folders(tmp_path_factory, monkeypatch):
    """What failing pushes leave behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("staged")))


@pytest.mark.parametrize("kind", ["anchor", "rich_anchor"])
def test_a_pushed_anchor_comes_back_bit_equal(hub, request, kind):
    anchor = request.getfixturevalue(kind)
    commit = anchor.push_to_hub(NAME, commit_message="First")
    repository = hub.repo(NAME, "dataset")
    files = {"README.md", "anchor.safetensors", "anchor_config.json", "layers.jsonl"}
    assert set(repository.files()) == files | ({"subspaces.jsonl"} if kind == "rich_anchor" else set())
    assert [made.title for made in repository.history()] == ["First", "initial commit"]
    assert commit.oid == repository.branches["main"]
    assert ActivationAnchor.from_pretrained(NAME) == anchor
    assert list(Path(tempfile.gettempdir()).iterdir()) == []


def test_an_anchor_without_subspaces_leaves_no_table_of_earlier_ones(hub, anchor, rich_anchor):
    rich_anchor.push_to_hub(NAME)
    anchor.push_to_hub(NAME)
    assert "subspaces.jsonl" not in hub.repo(NAME, "dataset").files()
    assert datasets.get_dataset_config_names(NAME) == ["layers"]


def test_branch_tag_and_commit_are_revisions(hub, anchor):
    from huggingface_hub import HfApi

    first = anchor.push_to_hub(NAME)
    HfApi().create_tag(NAME, tag="v1", repo_type="dataset")
    other = ActivationAnchor(anchor.mean + 1, anchor.variance, anchor.fingerprint)
    other.push_to_hub(NAME)
    third = ActivationAnchor(anchor.mean + 2, anchor.variance, anchor.fingerprint)
    third.push_to_hub(NAME, revision="pooled")
    for revision, expected in ((None, other), ("v1", anchor), (first.oid, anchor), ("pooled", third)):
        assert ActivationAnchor.from_pretrained(NAME, revision=revision) == expected
    with pytest.raises(
        OSError, match=r"no anchor at org/llama-anchor: .*\(revision v2\).* no such branch, tag or commit"
    ):
        ActivationAnchor.from_pretrained(NAME, revision="v2")
    assert 'revision="pooled"' in hub.repo(NAME, "dataset").files("pooled")["README.md"].decode()


def test_a_pull_request_changes_nothing_yet(hub, anchor):
    anchor.push_to_hub(NAME)
    other = ActivationAnchor(anchor.mean + 1, anchor.variance, anchor.fingerprint)
    commit = other.push_to_hub(NAME, create_pr=True, token=hub.stranger_token)
    assert ActivationAnchor.from_pretrained(NAME) == anchor
    assert ActivationAnchor.from_pretrained(NAME, revision=commit.pr_revision) == other


def test_a_private_anchor_needs_a_token(hub, anchor, monkeypatch):
    anchor.push_to_hub(NAME, private=True)
    assert ActivationAnchor.from_pretrained(NAME, token=hub.read_only_token) == anchor
    hub.clear_cache()
    for token in (hub.stranger_token, False):
        with pytest.raises(OSError, match="no such repository, or it is private"):
            ActivationAnchor.from_pretrained(NAME, token=token)
    monkeypatch.setenv("HF_TOKEN", hub.bad_token)
    with pytest.raises(OSError, match="does not accept the token") as found:
        ActivationAnchor.from_pretrained(NAME)
    assert hub.bad_token not in str(found.value)


def test_a_cached_anchor_is_there_offline_and_another_is_told(hub, anchor, tmp_path):
    anchor.push_to_hub(NAME)
    ActivationAnchor.from_pretrained(NAME)
    with hub.offline():
        assert ActivationAnchor.from_pretrained(NAME) == anchor
        with pytest.raises(OSError, match=r"no anchor at org/other: .*not in the cache, and HF_HUB_OFFLINE is set"):
            ActivationAnchor.from_pretrained("org/other")
        with pytest.raises(HubUploadError, match="HF_HUB_OFFLINE is set"):
            anchor.push_to_hub(NAME)
    with hub.unreachable():
        assert ActivationAnchor.from_pretrained(NAME) == anchor
    assert ActivationAnchor.from_pretrained(NAME, local_files_only=True) == anchor
    with pytest.raises(OSError, match="local_files_only"):
        ActivationAnchor.from_pretrained(NAME, local_files_only=True, cache_dir=tmp_path)
    assert ActivationAnchor.from_pretrained(NAME, cache_dir=tmp_path) == anchor
    assert ActivationAnchor.from_pretrained(NAME, local_files_only=True, cache_dir=tmp_path) == anchor


def test_a_push_that_fails_keeps_what_was_to_be_pushed(hub, anchor):
    hub.fail_next("POST", "/commit/", status=500)
    with pytest.raises(HubUploadError, match="hf upload org/llama-anchor") as found:
        anchor.push_to_hub(NAME)
    folder = Path(str(found.value).split(" was not pushed")[0])
    assert ActivationAnchor.from_pretrained(folder) == anchor
    assert (folder / "README.md").is_file()
    anchor.push_to_hub(NAME)
    assert ActivationAnchor.from_pretrained(NAME) == anchor


def test_a_file_that_was_tampered_with_is_refused(hub, anchor):
    anchor.push_to_hub(NAME)
    repository = hub.repo(NAME, "dataset")
    data = bytearray(repository.files()["anchor.safetensors"])
    data[-1] ^= 1
    repository.replace("anchor.safetensors", bytes(data))
    with pytest.raises(ValueError, match=r"anchor\.safetensors is corrupt or belongs to another anchor: its SHA-256"):
        ActivationAnchor.from_pretrained(NAME)


def test_a_model_of_another_base_is_refused(hub, anchor, build_model):
    anchor.push_to_hub(NAME)
    loaded = ActivationAnchor.from_pretrained(NAME)
    loaded.check_compatible(build_model("llama"))
    with pytest.raises(AnchorMismatchError, match="weights_sha256"):
        loaded.check_compatible(build_model("llama", seed=1))


def test_load_dataset_shows_the_tables(hub, rich_anchor):
    rich_anchor.push_to_hub(NAME)
    layers = datasets.load_dataset(NAME, split="train")
    assert layers["layer"] == list(range(rich_anchor.num_layers))
    torch.testing.assert_close(
        torch.tensor(layers["mean_rms"], dtype=torch.float64), rich_anchor.mean.double().square().mean(dim=1).sqrt()
    )
    torch.testing.assert_close(
        torch.tensor(layers["std_largest"], dtype=torch.float64), rich_anchor.variance.double().amax(dim=1).sqrt()
    )
    assert datasets.get_dataset_config_names(NAME) == ["layers", "subspaces"]
    subspaces = datasets.load_dataset(NAME, "subspaces", split="train")
    assert subspaces["rank"] == [rich_anchor.subspaces[row["linears"][0]].rank for row in subspaces]
    numbers = [int(linears[0].split(".")[1]) for linears in subspaces["linears"]]
    assert numbers == sorted(numbers)


def test_the_card_says_what_the_anchor_is(hub, rich_anchor, anchor):
    fingerprint = dataclasses.replace(anchor.fingerprint, base_model="org/base", revision="0a" * 20)
    ActivationAnchor(anchor.mean, anchor.variance, fingerprint).push_to_hub(NAME, dataset_license="cc-by-4.0")
    card = hub.repo(NAME, "dataset").files()["README.md"].decode()
    data = yaml.safe_load(card.split("---\n")[1])
    assert (data["license"], data["base_model"], data["size_categories"]) == ("cc-by-4.0", "org/base", "n<1K")
    assert data["configs"] == [{"config_name": "layers", "data_files": "layers.jsonl", "default": True}]
    for text in (
        f"https://huggingface.co/org/base/tree/{'0a' * 20}",
        "https://huggingface.co/datasets/org/questions",
        'from_pretrained("org/llama-anchor")',
        anchor.fingerprint.weights_sha256,
        "split `train`",
        f"{anchor.fingerprint.num_tokens} tokens",
        "licence `cc-by-4.0`",
    ):
        assert text in card
    assert hub.token not in card
    rich_anchor.push_to_hub("org/rich")
    rich = hub.repo("org/rich", "dataset").files()["README.md"].decode()
    assert "## Subspaces" in rich and "how sensitive the predictions are" in rich
    assert "base_model" not in rich.split("---\n")[1], "of a model without a name on the Hub"
    for text in (card, rich):
        assert check_metadata(text, "dataset") == ([], [])
        assert "\n\n\n" not in text and " \n" not in text


def test_anchors_of_one_base_compare_and_merge_from_the_hub(hub, anchor, build_model, make_batches):
    other = ActivationAnchor.collect(
        build_model("llama"), make_batches("llama", seed=5), dataset_id="org/questions:train", progress=False
    )
    anchor.push_to_hub(NAME)
    other.push_to_hub("org/other-anchor")
    loaded = [ActivationAnchor.from_pretrained(name) for name in (NAME, "org/other-anchor")]
    assert ActivationAnchor.merge(loaded) == ActivationAnchor.merge([anchor, other])
    distance = loaded[0].distance(loaded[1])
    for layer in range(anchor.num_layers):
        # Two Gaussians with diagonal covariances, in their square-root form.
        means = (anchor.mean[layer] - other.mean[layer]).double()
        roots = anchor.variance[layer].double().sqrt() - other.variance[layer].double().sqrt()
        expected = (means @ means + roots @ roots) / anchor.width
        assert distance[layer].item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.equal(distance, other.distance(anchor)) and not anchor.distance(anchor).any()
    elsewhere = ActivationAnchor.collect(build_model("llama", seed=1), make_batches("llama"), progress=False)
    with pytest.raises(AnchorMismatchError, match="anchors of different models do not compare: weights_sha256"):
        anchor.distance(elsewhere)


def test_a_fresh_process_loads_it_by_id_and_revision(hub, anchor, tmp_path):
    commit = anchor.push_to_hub(NAME, private=True)
    hub.repo(NAME, "dataset").replace("anchor_config.json", b"{}")
    script = (
        "import sys; from hf_aegis.anchors import ActivationAnchor\n"
        "anchor = ActivationAnchor.from_pretrained(sys.argv[1], revision=sys.argv[2])\n"
        "anchor.save_pretrained(sys.argv[3])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, NAME, commit.oid, str(tmp_path)],
        env=hub.environment(),
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ActivationAnchor.from_pretrained(tmp_path) == anchor
    assert hub.token not in done.stdout + done.stderr
